from __future__ import annotations

from paraserve_backend.agent.parts.progress import failure_of, first_cause
from paraserve_backend.errors import SourceUnavailable


def test_an_error_that_is_not_ours_is_not_quoted() -> None:
    failure = failure_of(OSError("/secret/path"))
    assert failure.grpc_code == "INTERNAL"
    assert "OSError" in failure.message
    assert "/secret" not in failure.message


def test_the_first_cause_of_nested_groups_is_found() -> None:
    cause = SourceUnavailable("no")
    group = ExceptionGroup("outer", [ExceptionGroup("inner", [cause]), ValueError("later")])
    assert first_cause(group) is cause
