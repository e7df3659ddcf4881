from __future__ import annotations

import random
from itertools import islice

from paraserve_backend.daemon.retry import Backoff


def test_pauses_double_up_to_their_limit_less_up_to_a_half() -> None:
    pauses = Backoff(base_s=0.5, limit_s=3.0).pauses(random.Random(1))
    for pause_s, most_s in zip(pauses, [0.5, 1.0, 2.0, 3.0, 3.0], strict=False):
        assert most_s / 2 <= pause_s <= most_s


def test_two_callers_do_not_come_back_together() -> None:
    ours, theirs = (list(islice(Backoff().pauses(random.Random(seed)), 5)) for seed in (1, 2))
    assert all(our != their for our, their in zip(ours, theirs, strict=True))


def test_pauses_never_end() -> None:
    assert next(islice(Backoff().pauses(random.Random(1)), 5000, None)) <= 2.0
