"""Kills an engine's processes when the model's process that started them ends, however it ends.

Engines hold gigabytes in processes of their own, and whoever kills a model's process knows only
that one process.
"""

from __future__ import annotations

import os
import subprocess

#: It gets a line when all is well, and the end of its input when its parent is gone.
_SCRIPT = 'read -r line && exit 0; kill -s KILL -- "-$0"'


class ProcessGuard:
    """Made before the engine starts: what is started after it, at any depth, dies with us."""

    def __init__(self) -> None:
        """Move this process to a process group of its own and watch over that."""
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, str(os.getpgrp())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """Watch no more: the engine has stopped."""
        self._guard.communicate(b"\n")
