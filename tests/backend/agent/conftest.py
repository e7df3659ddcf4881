from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.agents import FakeNode, fake_node


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[FakeNode]:
    """A node of fakes whose parts have time enough to come and to go."""
    async with fake_node(tmp_path) as node:
        yield node
