"""Fetches on a machine that may be as slow as it likes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from paraserve_backend.weights.fetching import assignment
from paraserve_backend.weights.sources import peer
from tests.support.limits import HANG_S


@contextmanager
def patient_fetches() -> Iterator[None]:
    """Have no disk and no peer taken for silent, slow or late: what they have, they bring."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_ANSWER_S", HANG_S)
        patch.setattr(assignment, "_HELP_AFTER_S", HANG_S)
        patch.setattr(assignment, "_LATE_AFTER_S", HANG_S)
        patch.setattr(peer, "_TIMEOUT_S", HANG_S)
        yield
