"""The log of our processes: one format, on stderr."""

from __future__ import annotations

import logging

_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format=_FORMAT)
