"""Random input to whatever takes some: tokens into text, bodies of both protocols, settings.

    python -m integration.fuzz

Seeded: a seed makes the same inputs again. A finding is printed with its seed and its input. The
last line is JSON; the exit status is 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence

from integration.fuzz.runner import Outcome
from integration.fuzz.session import run

TARGETS = {"inputs": 100_000, "crashes": 0, "hangs": 0, "http_500": 0, "rss_growth_mb": 30}
_DEFAULT_INPUTS = 120_000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--inputs", type=int, default=_DEFAULT_INPUTS, help="of all targets")
    arguments = parser.parse_args(argv)
    began_s = time.monotonic()
    figures = result(asyncio.run(run(arguments.inputs, arguments.seed)))
    took_s = round(time.monotonic() - began_s, 1)
    sys.stdout.write(json.dumps({**figures, "seed": arguments.seed, "took_s": took_s}) + "\n")
    return 0 if figures["met"] else 1


def result(outcome: Outcome) -> dict[str, object]:
    figures = {
        "inputs": outcome.num_inputs,
        **{kind: outcome.findings[kind] for kind in ("crashes", "hangs", "http_500")},
        "rss_growth_mb": outcome.rss_growth_mb,
    }
    met = figures["inputs"] >= TARGETS["inputs"] and all(
        figures[name] <= most for name, most in TARGETS.items() if name != "inputs"
    )
    return {"bench": "fuzz", **figures, "targets": TARGETS, "met": met}


if __name__ == "__main__":
    sys.exit(main())
