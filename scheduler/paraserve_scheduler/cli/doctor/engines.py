"""`paraserve doctor --trtllm` and `--vllm`: is the installed engine one that ParaServe works with?

It imports the engine, so run it where the engine shall run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

from paraserve_backend.engines.signatures import TABLES, Table, differences
from paraserve_scheduler.cli.doctor.machine import Finding, State

_REMEDY = "use a version that docs/engines.md names"


def examine_engine(
    engine: str,
    load: Callable[[str], Any] = importlib.import_module,
    version: Callable[[str], str] = importlib.metadata.version,
) -> tuple[Finding, ...]:
    """Compare what is called of an engine with what is installed.

    Args:
        engine: as a deployment names it.
        load: imports a module by its name.
        version: tells the version of a distribution; raises PackageNotFoundError.
    """
    table = TABLES[engine]
    try:
        load(table.package)
    except ImportError as error:
        return (_missing(table, f"cannot be imported in this environment: {error}"),)
    except Exception as error:
        # Engines look for a GPU and its driver while they are imported.
        return (_missing(table, f"fails when imported: {type(error).__name__}: {error}"),)
    found = differences(table, load)
    if not found:
        detail = f"{_version(table, version)} has all that is called ({table.versions})"
        return (Finding(name=engine, state=State.OK, detail=detail),)
    return tuple(
        Finding(name=engine, state=State.MISSING, detail=sentence, remedy=_REMEDY)
        for sentence in found
    )


def _missing(table: Table, detail: str) -> Finding:
    remedy = f"run this with the Python of the Triton server that has {table.engine}"
    return Finding(name=table.engine, state=State.MISSING, detail=detail, remedy=remedy)


def _version(table: Table, version: Callable[[str], str]) -> str:
    for distribution in table.distributions:
        try:
            return f"{distribution} {version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return table.package
