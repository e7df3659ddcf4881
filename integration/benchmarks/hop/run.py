"""One forward pass over four Triton servers: the activation channel beside a chain of Triton calls.

    python -m integration.benchmarks.hop.run

Real tritonservers on loopback with near-empty stand-in stages; link role, channel and ensemble are
the product's own, and both pipelines are called by BLS as the generate role does. They take turns
in one run and medians count. Then what the generate loop adds to an engine in its own process. The
last line is JSON; the exit status is 1 if a target was missed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from integration.benchmarks.hop import token_loop
from integration.benchmarks.hop.chain import (
    CHAIN,
    HEAD,
    NODES,
    OURS,
    ROW_BYTES,
    Passes,
    hop_chain,
)

_ROUNDS = 8
#: Called so often between two that are not measured, the caches being another pipeline's.
_WARM_UP_PASSES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    name: str
    tokens: int
    passes: int


SIZES = (
    Size(name="8kb", tokens=1, passes=40),
    Size(name="4mb", tokens=(4 << 20) // ROW_BYTES, passes=6),
)
#: Smallest ratio of the chain's time to ours; largest milliseconds of the costs.
MIN_TARGETS = {"ratio_8kb": 2.5, "ratio_4mb": 5.0}
MAX_TARGETS = {"hop_8kb_ms": 0.3, "token_loop_overhead_ms": 0.2}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, hop_chain(Path(folder)) as passes:
        figures = {key: value for size in SIZES for key, value in compare(passes, size).items()}
    loop = token_loop.measure()
    figures |= {
        "token_loop_ms": 1e3 * loop.loop_s,
        "engine_step_ms": 1e3 * loop.engine_s,
        "token_loop_overhead_ms": 1e3 * loop.overhead_s,
    }
    result = summary(figures)
    sys.stdout.write(table(figures) + "\n" + json.dumps(result) + "\n")
    return 0 if result["met"] else 1


def compare(passes: Passes, size: Size) -> dict[str, float]:
    """Measure one size of hidden states: medians in milliseconds, and their ratio."""
    seconds: dict[str, list[float]] = {OURS: [], CHAIN: [], HEAD: []}
    for _ in range(_ROUNDS):
        for model, measured in seconds.items():
            wanted = _WARM_UP_PASSES + size.passes
            made = passes.seconds(model, tokens=size.tokens, passes=wanted)
            measured += made[_WARM_UP_PASSES:].tolist()
    ours, chain, head = (1e3 * float(np.median(seconds[model])) for model in (OURS, CHAIN, HEAD))
    return {
        f"ours_{size.name}_ms": ours,
        f"chain_{size.name}_ms": chain,
        f"head_{size.name}_ms": head,
        f"ratio_{size.name}": chain / ours,
        # There are three to stages; the result's way back to the head counts with them.
        f"hop_{size.name}_ms": (ours - head) / (NODES - 1),
    }


def summary(figures: Mapping[str, float]) -> dict[str, object]:
    """Return the last line."""
    met = {name: figures[name] >= least for name, least in MIN_TARGETS.items()} | {
        name: figures[name] <= most for name, most in MAX_TARGETS.items()
    }
    return {
        "bench": "hop",
        "nodes": NODES,
        **{name: round(value, 3) for name, value in figures.items()},
        "targets": {**MIN_TARGETS, **MAX_TARGETS},
        "missed": [name for name, is_met in met.items() if not is_met],
        "met": all(met.values()),
    }


def table(figures: Mapping[str, float]) -> str:
    rows = [f"{'hidden':>6} {'ours':>9} {'chain':>9} {'head only':>9} {'per hop':>9} {'ratio':>6}"]
    for size in SIZES:
        ours, chain, head, hop = (
            figures[f"{name}_{size.name}_ms"] for name in ("ours", "chain", "head", "hop")
        )
        rows.append(
            f"{size.name:>6} {ours:6.2f} ms {chain:6.2f} ms {head:6.2f} ms {hop:6.2f} ms "
            f"{figures[f'ratio_{size.name}']:6.1f}"
        )
    rows.append(
        f"token loop {figures['token_loop_ms']:.3f} ms an iteration, "
        f"engine alone {figures['engine_step_ms']:.3f} ms"
    )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
