from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.agents import AgentHarness, agent_harness


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[AgentHarness]:
    """A node of fakes whose parts have time enough to come and to go."""
    async with agent_harness(tmp_path) as node:
        yield node
