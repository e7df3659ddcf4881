from __future__ import annotations

import gc
import weakref

from paraserve_scheduler.reconciler.per_deployment import kept_per_deployment
from paraserve_scheduler.reconciler.placement import equal_split
from paraserve_scheduler.state.spec import Deployment
from tests.support.scheduler_records import make_deployment


def test_what_was_found_is_kept_by_deployment_and_arguments() -> None:
    asked: list[tuple[str, int, bool]] = []

    @kept_per_deployment
    def found(deployment: Deployment, number: int, *, is_odd: bool = False) -> str:
        asked.append((deployment.name, number, is_odd))
        return f"{deployment.name} {number} {is_odd}"

    first, second = make_deployment("a"), make_deployment("b")
    for _ in range(2):
        assert found(first, 1) == "a 1 False"
        assert found(first, 2) == "a 2 False"
        assert found(first, 2, is_odd=True) == "a 2 True"
        assert found(second, 1) == "b 1 False"
    assert asked == [("a", 1, False), ("a", 2, False), ("a", 2, True), ("b", 1, False)]


def test_nothing_is_kept_of_a_deployment_that_is_gone() -> None:
    deployment = make_deployment()
    assert len(equal_split(deployment, 2, 16)) == 2
    left = weakref.ref(deployment)
    del deployment
    gc.collect()
    assert left() is None


def test_what_is_kept_of_one_deployment_is_bounded() -> None:
    asked: list[int] = []

    @kept_per_deployment
    def found(_: Deployment, number: int) -> int:
        asked.append(number)
        return number

    deployment = make_deployment()
    for number in [*range(10_000), 9_999]:
        assert found(deployment, number) == number
    assert asked == list(range(10_000))
    assert found(deployment, 0) == 0
    assert asked[-1] == 0
