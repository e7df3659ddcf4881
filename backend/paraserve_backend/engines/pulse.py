"""The file that an engine's loop touches while it turns, for the agent to see that it does."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from paraserve_backend.daemon.private_files import create_file, make_folder
from paraserve_backend.errors import InvalidRequest

logger = logging.getLogger(__name__)
#: A loop turns at least so often, with or without something to do.
TURN_S = 0.25


class Pulse:
    """Used by the loop's thread alone; nothing about the file ever ends the loop."""

    def __init__(self, path: Path | None, now_s: Callable[[], float] = time.monotonic) -> None:
        """Begin with no file: who has none has not begun to turn.

        Args:
            path: of the file; `None` where there is no agent that would look at it.
            now_s: a monotonic clock.
        """
        self._path = path
        self._now_s = now_s
        self._next_s = 0.0
        self._descriptor: int | None = None

    def beat(self) -> None:
        """Touch the file, if it has not been touched just now."""
        now_s = self._now_s()
        if self._path is None or now_s < self._next_s:
            return
        self._next_s = now_s + TURN_S / 2
        try:
            if self._descriptor is None:
                make_folder(self._path.parent)
                self._descriptor = create_file(self._path, at_most_one=False)
            os.utime(self._descriptor)
        except (OSError, InvalidRequest) as error:
            # No pulse at all is better than one that looks like a dead loop's.
            logger.error("%s cannot be touched: %s", self._path, error)
            self.close()

    def close(self) -> None:
        """Remove the file: a loop that was stopped is not a dead one."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._path = self._descriptor = None
