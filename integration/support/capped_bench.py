"""A benchmark with capped networks as a command: skipped, interrupted, failed or met."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from integration.support.namespaces import missing_requirement
from paraserve_backend.errors import ParaServeError


def run_bench(
    name: str, measure: Callable[[Path, Console], dict[str, Any]], *, keep: bool = False
) -> int:
    """Measure, print the result as the last line and return the exit status.

    Args:
        name: of the benchmark.
        measure: is given a folder for its checkpoint; returns the last line, with `met`.
        keep: whether that folder stays for the next run.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(highlight=False)
    reason = missing_requirement()
    if reason is not None:
        console.print(f"Skipped: {reason}.")
        sys.stdout.write(json.dumps({"bench": name, "skipped": reason}) + "\n")
        return 0
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "paraserve" / f"bench-{name}"
    try:
        result = measure(folder, console)
    except KeyboardInterrupt:
        console.print("\ninterrupted; the cluster is gone")
        return 130
    except ParaServeError as error:
        show_failure("The benchmark", error, console)
        return 1
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if result["met"] else 1


def show_failure(what: str, error: ParaServeError, console: Console) -> None:
    """Say why, and what the cluster's logs say."""
    console.print(f"[bold red]{what} failed:[/] {error}", soft_wrap=True)
    for note in getattr(error, "__notes__", ()):
        console.print(note, markup=False, soft_wrap=True)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
