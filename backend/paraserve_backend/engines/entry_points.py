"""Finds engines by name among the entry points of installed packages, group `paraserve.engines`.

Nothing of an engine is imported before a model that uses it loads.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import cast

from paraserve_backend.engines.base import Engine
from paraserve_backend.errors import InvalidRequest, ParaServeError

GROUP = "paraserve.engines"


def make_engine(name: str) -> Engine:
    """Import the engine that a package offers under this name, and make one.

    Raises:
        InvalidRequest: no package offers it, several do, or its code does not work here.
    """
    offered = entry_points(group=GROUP)
    found = tuple(offered.select(name=name))
    if not found:
        known = ", ".join(["paraserve", *sorted(offered.names)])
        raise InvalidRequest(f"Parameter 'engine' is {name!r}; use one of {known}.")
    if len(found) > 1:
        packages = ", ".join(sorted(map(_package, found)))
        raise InvalidRequest(
            f"Several packages offer the engine {name!r}: {packages}; uninstall all but one."
        )
    return _make(found[0])


def _make(entry: EntryPoint) -> Engine:
    try:
        return cast(Engine, entry.load()())
    except ParaServeError:
        raise
    except Exception as error:  # a package's code may raise anything when it is imported
        raise InvalidRequest(
            f"The engine {entry.name!r} of package {_package(entry)} cannot be made from "
            f"{entry.value} ({type(error).__name__}: {error}); repair that package."
        ) from error


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "?"
