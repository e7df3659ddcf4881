"""`paraserve doctor --run-dir DIR --disk-dir DIR`: what a node keeps of weights, and its damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from paraserve_backend.errors import NotFound
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.weights.tiers.inspection import Inspection, inspect_disk, inspect_tier
from paraserve_scheduler.cli.doctor.machine import Finding, State

_MB = 1e6
#: Said of a damaged tier, of which there may be thousands.
_MOST_PROBLEMS = 20


def examine_tiers(run_dir: Path | None, disk_dir: Path | None) -> tuple[Finding, ...]:
    """Look at the tiers in an agent's folders, as its settings name them; it may be running."""
    findings: list[Finding] = []
    if run_dir is not None:
        tier = RunDir(run_dir).tier
        remedy = "restart the agent: it drops what it cannot trust, and fetches it again"
        findings += _findings("memory tier", lambda: inspect_tier(tier.path), remedy)
    if disk_dir is not None:
        remedy = "nothing to do: the agent drops it when it comes to it, and fetches it again"
        findings += _findings("disk tier", lambda: inspect_disk(disk_dir), remedy)
    return tuple(findings)


def _findings(name: str, inspect: Callable[[], Inspection], remedy: str) -> list[Finding]:
    try:
        found = inspect()
    except NotFound as error:
        return [
            Finding(
                name=name,
                state=State.MISSING,
                detail=str(error),
                remedy="give the folder that the agent's settings name",
            )
        ]
    said = f"{found.num_objects} objects, {found.used_bytes / _MB:.1f} MB"
    damage = [
        Finding(name=name, state=State.DAMAGED, detail=problem, remedy=remedy)
        for problem in found.problems[:_MOST_PROBLEMS]
    ]
    if len(found.problems) > _MOST_PROBLEMS:
        said += f", {len(found.problems)} problems, of which the first {_MOST_PROBLEMS} follow"
    return [Finding(name=name, state=State.OK, detail=said), *damage]
