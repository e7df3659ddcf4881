"""How long a test waits for what must happen: only a hang takes so long, on any machine."""

from __future__ import annotations

HANG_S = 300.0
