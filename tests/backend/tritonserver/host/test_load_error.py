from __future__ import annotations

import pytest

from paraserve_backend.agent.parts.progress import failure_of, first_cause
from paraserve_backend.errors import (
    InvalidCheckpoint,
    InvalidRequest,
    ParaServeError,
    SourceUnavailable,
    Unavailable,
)
from paraserve_backend.tritonserver.host.client import load_error

_PREAMBLE = "load failed for model 'm': version 1 is at UNAVAILABLE state: "


@pytest.mark.parametrize(
    ("details", "kind", "message"),
    [
        (
            _PREAMBLE + "Internal: InvalidCheckpoint: Tensor x is missing. Replace it.\n\nAt:\n"
            "  /tmp/be/paraserve/model.py(7): initialize\n;\n",
            InvalidCheckpoint,
            "Tensor x is missing. Replace it.",
        ),
        (
            _PREAMBLE + "Internal: paraserve_backend.errors.SourceUnavailable: No answer: try: "
            "later\n\nAt:\n  /x.py(1): y\n;\n",
            SourceUnavailable,
            "No answer: try: later",
        ),
        (
            _PREAMBLE + "Internal: TritonModelException: It is broken.\n\nAt:\n  /x.py(1): y\n;\n",
            ParaServeError,
            "Model m failed to load: It is broken.",
        ),
        (
            _PREAMBLE + "Internal: TritonModelException: INVALID_ARGUMENT: tokenizer.json cannot "
            "be read: no.\n\nAt:\n  /x.py(1): y\n;\n",
            InvalidRequest,
            "tokenizer.json cannot be read: no.",
        ),
        (
            _PREAMBLE + "Internal: ValueError: 3 is\n  not 4\n\nAt:\n  /x.py(1): y\n;\n",
            ParaServeError,
            "Model m failed to load: ValueError: 3 is not 4",
        ),
        (
            _PREAMBLE + "Internal: Stub process 'm_0_0' is not healthy.;",
            Unavailable,
            "The process of model m died while it loaded.",
        ),
        (
            "failed to load 'm', failed to poll from model repository",
            ParaServeError,
            "Model m failed to load: failed to load 'm', failed to poll from model repository",
        ),
    ],
)
def test_the_cause_is_taken_out_of_tritons_text(
    details: str, kind: type[ParaServeError], message: str
) -> None:
    error = load_error("m", details)
    assert (type(error), str(error)) == (kind, message)


def test_an_error_that_is_not_ours_is_not_quoted() -> None:
    failure = failure_of(OSError("/secret/path"))
    assert failure.grpc_code == "INTERNAL"
    assert "OSError" in failure.message
    assert "/secret" not in failure.message


def test_the_first_cause_of_nested_groups_is_found() -> None:
    cause = SourceUnavailable("no")
    group = ExceptionGroup("outer", [ExceptionGroup("inner", [cause]), ValueError("later")])
    assert first_cause(group) is cause
