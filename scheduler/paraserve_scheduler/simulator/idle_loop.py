"""An event loop that tells when it has nothing to do, so that virtual time passes only then."""

from __future__ import annotations

import asyncio
import selectors


class _IdleSelector(selectors.DefaultSelector):
    """A loop asks its selector to wait only while no task and no callback is ready."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[asyncio.Future[None]] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout != 0 and self.waiting:
            for future in self.waiting:
                future.set_result(None)
            self.waiting.clear()
            timeout = 0
        return super().select(timeout)


class IdleLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._idle_selector = _IdleSelector()
        super().__init__(self._idle_selector)

    async def idle(self) -> None:
        """Return when every task waits: all has happened that needs no time."""
        future: asyncio.Future[None] = self.create_future()
        self._idle_selector.waiting.append(future)
        await future
