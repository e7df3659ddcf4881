from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from hypothesis import given
from hypothesis import strategies as st

from paraserve_scheduler.simulator.idle_loop import IdleLoop


def _run(scenario: Callable[[IdleLoop], Coroutine[None, None, None]]) -> None:
    with asyncio.Runner(loop_factory=IdleLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, IdleLoop)
        runner.run(scenario(loop))


@given(st.lists(st.integers(0, 200), max_size=5))
def test_a_loop_is_idle_only_after_the_last_step_of_every_task(steps: list[int]) -> None:
    async def scenario(loop: IdleLoop) -> None:
        left = list(steps)

        async def work(index: int) -> None:
            while left[index]:
                await asyncio.sleep(0)
                left[index] -= 1

        tasks = [asyncio.create_task(work(index)) for index in range(len(steps))]
        await loop.idle()
        assert not any(left)
        assert all(task.done() for task in tasks)

    _run(scenario)


def test_tasks_that_wait_for_an_event_or_for_real_time_are_idle() -> None:
    async def scenario(loop: IdleLoop) -> None:
        event = asyncio.Event()
        tasks = [asyncio.create_task(event.wait()), asyncio.create_task(asyncio.sleep(3600))]
        await loop.idle()
        assert not any(task.done() for task in tasks)
        event.set()
        await loop.idle()
        assert [task.done() for task in tasks] == [True, False]
        tasks[1].cancel()

    _run(scenario)


def test_all_who_wait_for_an_idle_loop_go_on() -> None:
    async def scenario(loop: IdleLoop) -> None:
        await asyncio.gather(*(loop.idle() for _ in range(3)))

    _run(scenario)
