from __future__ import annotations

import pytest

from paraserve_backend.agent.parts.progress import PartProgress
from paraserve_backend.rpc import paraserve_pb2 as pb


def make_progress() -> PartProgress:
    return PartProgress("tiny.1", 0, now=lambda: 1.0, on_phase=lambda: None)


@pytest.mark.parametrize("phase", [pb.READY, pb.FAILED, pb.STOPPED])
async def test_a_slow_follower_gets_the_last_status_too(phase: pb.Phase.ValueType) -> None:
    """The part ends while its follower is still busy with the status before."""
    progress = make_progress()
    seen = []
    async for status in progress.follow():
        seen.append(status.phase)
        if status.phase == pb.STARTING:
            progress.move(phase)
    assert seen == [pb.STARTING, phase]
