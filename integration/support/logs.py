"""What a cluster's logs say last: a test or benchmark that fails takes the files with it."""

from __future__ import annotations

from collections.abc import Iterator

from paraserve_scheduler.local.children import log_tail
from paraserve_scheduler.local.layout import ClusterFiles

_SHOWN_LINES = 40


def log_tails(files: ClusterFiles) -> Iterator[tuple[str, str]]:
    """The name and the end of each log, by name."""
    for log in sorted(files.logs.glob("*.log")):
        yield log.name, log_tail(log, _SHOWN_LINES)
