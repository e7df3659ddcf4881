"""Cold starts on nodes of mixed bandwidth in the simulator, against the sum of their bandwidths.

`python -m integration.experiments.simulate_mixed [--out FILE]` tries every mix of two to four nodes
of 10, 25 and 100 Gbit/s. A cold start may take 1.1 times the model's size over the sum of its
nodes' bandwidths, plus what it takes with nothing to fetch. Prints a table and, last, one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from pathlib import Path

from paraserve_scheduler.planner.cost import (
    ModelShape,
    NodeKind,
    Speed,
    StartMethod,
    prefill_s,
    uniform_model,
)
from paraserve_scheduler.planner.decisions import Decision, Start
from paraserve_scheduler.planner.fleet import Fleet, Objectives
from paraserve_scheduler.policies.registry import find_policy
from paraserve_scheduler.simulator.description import (
    ClusterDescription,
    DeploymentDescription,
    NodeDescription,
)
from paraserve_scheduler.simulator.workload import Lengths, SimRequest, Tokens
from paraserve_scheduler.simulator.world import Simulation

_GB = 10**9
_GBITS = (10, 25, 100)
_MOST_OVER_BANDWIDTH = 1.1
_TOKENS = 256
#: GB, layers, GB of the embedding and of the head each: Llama 2 7B, 13B and 70B in 16 bits.
_MODELS = {"7b": (13.5, 32, 0.26), "13b": (26.0, 40, 0.33), "70b": (138.0, 80, 0.52)}
#: None: as parallel as it may be; the other cannot be met, so that the earliest plan is taken.
_TTFT_SLOS_S = (None, 0.5)
#: Until a process can take in weights: a new one, and a runtime slot, beside which hardly anything
#: of a fetch is hidden.
_RUNTIMES_S = (2.0, 0.1)
_SPEED = Speed(prefill_s_per_token=0.0003, decode_s=0.03)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    gbits: tuple[int, ...]
    model: str
    ttft_slo_s: float | None
    runtime_s: float
    #: Bandwidths of the nodes that were chosen.
    used_gbits: tuple[int, ...]
    #: Size over the sum of these.
    transfer_s: float
    #: The same cold start with nothing to fetch.
    floor_s: float
    ttft_s: float

    @property
    def over_bandwidth(self) -> float:
        """What it takes beyond its floor, as a multiple of the transfer at full bandwidth."""
        return (self.ttft_s - self.floor_s) / self.transfer_s

    @property
    def limit_s(self) -> float:
        return _MOST_OVER_BANDWIDTH * self.transfer_s + self.floor_s


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="simulate_mixed", description=__doc__)
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args(argv)
    starts = list(every_start(mixes((2, 3, 4)), _MODELS))
    text = table(starts)
    sys.stdout.write(text)
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    worst = max(start.over_bandwidth for start in starts)
    result = {
        "bench": "simulate-mixed",
        "cold_starts": len(starts),
        "worst_over_bandwidth": round(worst, 3),
        "target_over_bandwidth": _MOST_OVER_BANDWIDTH,
        "met": all(start.ttft_s <= start.limit_s for start in starts),
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def mixes(sizes: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Every mix of so many nodes that is not of one bandwidth only."""
    for size in sizes:
        for gbits in combinations_with_replacement(_GBITS, size):
            if len(set(gbits)) > 1:
                yield gbits


def every_start(gbits: Iterable[tuple[int, ...]], models: Iterable[str]) -> Iterator[ColdStart]:
    models = list(models)
    for mix in gbits:
        for model in models:
            for ttft_slo_s, runtime_s in product(_TTFT_SLOS_S, _RUNTIMES_S):
                yield cold_start(mix, model, ttft_slo_s, runtime_s)


def cold_start(
    gbits: tuple[int, ...], name: str, ttft_slo_s: float | None, runtime_s: float
) -> ColdStart:
    """One request for a model that is nowhere, on idle nodes."""
    model = _model(name)
    kind = NodeKind(name="gpu", start=_method(runtime_s), speeds={name: _SPEED})
    started: list[Start] = []
    request = SimRequest(
        deployment=name, arrival_s=10.0, prompt_tokens=_TOKENS, output_tokens=_TOKENS
    )

    def watched(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
        decisions = find_policy("paraserve").decide(fleet, now_s)
        started.extend(it for it in decisions if isinstance(it, Start))
        return decisions

    Simulation(_cluster(gbits, kind, model, ttft_slo_s), [request], watched).run()
    assert request.ttft_s is not None, "the only request is served"
    used = tuple(gbits[int(stage.node)] for stage in started[0].stages)
    return ColdStart(
        gbits=gbits,
        model=name,
        ttft_slo_s=ttft_slo_s,
        runtime_s=runtime_s,
        used_gbits=used,
        transfer_s=model.total_bytes * 8e-9 / sum(used),
        floor_s=_floor_s(started[0], kind.start, model),
        ttft_s=request.ttft_s,
    )


def _method(runtime_s: float) -> StartMethod:
    return StartMethod(
        runtime_s=runtime_s, tail_s=0.45, load_s_per_byte=0.02 / _GB, pipeline_setup_s=0.3
    )


def _floor_s(start: Start, method: StartMethod, model: ModelShape) -> float:
    largest = max(model.bytes_of(stage.start, stage.end) for stage in start.stages)
    count, full = len(start.stages), sum(stage.grows for stage in start.stages)
    prompt_s = prefill_s(_SPEED, _TOKENS, stages=count, full=full, hop_s=0.001)
    setup_s = method.pipeline_setup_s if count > 1 else 0.0
    load_s = largest * method.load_s_per_byte
    return method.runtime_s + method.tail_s + load_s + setup_s + prompt_s


def _model(name: str) -> ModelShape:
    size_gb, layers, ends_gb = _MODELS[name]
    return uniform_model(
        name,
        size_bytes=round(size_gb * _GB),
        num_layers=layers,
        ends_bytes=round(ends_gb * _GB),
        kv_bytes=5 * _GB,
    )


def _cluster(
    gbits: Sequence[int], kind: NodeKind, model: ModelShape, ttft_slo_s: float | None
) -> ClusterDescription:
    length = Lengths(mean=_TOKENS, cv=0.0, most=_TOKENS)
    return ClusterDescription(
        nodes=tuple(
            NodeDescription(
                name=str(number),
                kind=kind,
                nic_bytes_per_s=gbit * 1e9 / 8,
                gpu_bytes=(160 * _GB,),
                memory_bytes=0,
            )
            for number, gbit in enumerate(gbits)
        ),
        deployments=(
            DeploymentDescription(
                name=model.name,
                application="all",
                model=model,
                objectives=Objectives(ttft_s=ttft_slo_s),
                max_sequences=8,
                max_stages=4,
                tokens=Tokens(prompt=length, output=length),
            ),
        ),
        store_bytes_per_s=None,
    )


def table(starts: Sequence[ColdStart]) -> str:
    heads = [
        "nodes, Gbit/s",
        "model",
        "used",
        "M / ΣB, s",
        "floor, s",
        "TTFT, s",
        "limit, s",
        "over",
    ]
    lines = ["From a runtime slot, no TTFT objective; `over` is (TTFT - floor) / (M / ΣB).\n"]
    lines += [_row(heads), _row(["---"] * len(heads))]
    for it in starts:
        if it.ttft_slo_s is None and it.runtime_s == min(_RUNTIMES_S):
            figures = (it.transfer_s, it.floor_s, it.ttft_s, it.limit_s, it.over_bandwidth)
            mix, used = ("+".join(map(str, gbits)) for gbits in (it.gbits, it.used_gbits))
            lines.append(_row([mix, it.model, used, *(f"{value:.2f}" for value in figures)]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
