"""Which KV blocks are free. Block numbers are the same on every stage of a replica, so one pool,
owned by the generate loop, serves them all.
"""

from __future__ import annotations


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Hand out `count` blocks, or none at all when there are not enough."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))

    def check_integrity(self, owned: list[int]) -> None:
        """Assert that every block is either free or owned by exactly one sequence."""
        assert sorted([*self._free, *owned]) == list(range(self.num_blocks)), "KV blocks leaked"
