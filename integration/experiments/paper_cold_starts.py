"""Figure 7 in the simulator: one cold request per system, GPU and checkpoint on idle servers."""

from __future__ import annotations

from dataclasses import replace

from integration.experiments.paper_numbers import CHECKPOINTS, COLD_TTFT_S
from paraserve_scheduler.planner.cost import ModelShape
from paraserve_scheduler.planner.decisions import (
    Decision,
    PolicyFunction,
    StageChoice,
    StageSource,
    Start,
)
from paraserve_scheduler.planner.fleet import Fleet, Node
from paraserve_scheduler.policies import serverless_vllm, serverlessllm
from paraserve_scheduler.policies.baseline_rules import equal_bounds
from paraserve_scheduler.simulator.description import (
    ClusterFile,
    DeploymentFile,
    ModelFile,
    NodeFile,
    SpeedFile,
    describe,
)
from paraserve_scheduler.simulator.workload import SimRequest
from paraserve_scheduler.simulator.world import Simulation

#: Servers of testbed i: GPUs, GB each, GB of host memory for weights.
_SERVERS = {"v100": (4, 32.0, 29.0), "a10": (1, 22.0, 17.2)}
#: Below this HydraServe uses one worker in this figure.
_ONE_WORKER_GB = 10.0


def cold_ttfts(testbed: ClusterFile) -> dict[str, dict[str, dict[str, float]]]:
    """Simulated seconds, in the form of `COLD_TTFT_S`, with the constants of `testbed`."""
    return {
        gpu: {
            system: {model: _ttft_s(testbed, gpu, system, model) for model in measured}
            for system, measured in systems.items()
        }
        for gpu, systems in COLD_TTFT_S.items()
    }


def _ttft_s(testbed: ClusterFile, gpu: str, system: str, model: str) -> float:
    worker = system.partition(",")[0]
    cluster = describe(_cluster(testbed, gpu, model), worker, "testbed i")
    # The second comes when the first one's instance is gone and the model is in host memory.
    times = (0.0, 500.0) if "cached" in system else (0.0,)
    requests = [
        SimRequest(deployment="it", arrival_s=time_s, prompt_tokens=30, output_tokens=20)
        for time_s in times
    ]
    Simulation(cluster, requests, _policy(system, model)).run()
    ttft_s = requests[-1].ttft_s
    assert ttft_s is not None, "an idle cluster serves its only request"
    return ttft_s


def _policy(system: str, model: str) -> PolicyFunction:
    if system == "serverless-vllm":
        return serverless_vllm.decide
    if system.startswith("serverlessllm"):
        return serverlessllm.decide
    single = "1 worker" in system or CHECKPOINTS[model][0] < _ONE_WORKER_GB
    return _Static(1 if single else 4)


class _Static:
    """Always so many equal stages, as the figure's runs were set up."""

    def __init__(self, stages: int) -> None:
        self._stages = stages

    def __call__(self, fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
        return tuple(
            _start(need.name, need.model, fleet.nodes[: self._stages])
            for need in fleet.needs
            if need.waiting and not need.replicas
        )


def _start(name: str, model: ModelShape, nodes: tuple[Node, ...]) -> Start:
    bounds = equal_bounds(model.layer_bytes, len(nodes))
    stages = tuple(
        StageChoice(
            node=node.name,
            gpu=0,
            start=start,
            end=end,
            reserved_bytes=model.reserved_bytes(start, end),
            sources=(StageSource(size_bytes=model.bytes_of(start, end)),),
        )
        for node, start, end in zip(nodes, bounds, bounds[1:], strict=False)
    )
    return Start(deployment=name, stages=stages, reason="static")


def _cluster(testbed: ClusterFile, gpu: str, model: str) -> ClusterFile:
    gpus, gpu_gb, memory_gb = _SERVERS[gpu]
    size_gb, layers, ends_gb = CHECKPOINTS[model]
    kinds = tuple(
        replace(kind, speeds=(_speed_for(kind.speeds, size_gb, model),)) for kind in testbed.kinds
    )
    node = NodeFile(
        name="n", kind=gpu, count=4, nic_gbit=16, gpus=gpus, gpu_gb=gpu_gb, memory_gb=memory_gb
    )
    shape = ModelFile(name=model, size_gb=size_gb, num_layers=layers, ends_gb=ends_gb, kv_gb=0.5)
    return ClusterFile(
        kinds=kinds,
        nodes=(node,),
        models=(shape,),
        deployments=(DeploymentFile(name="it", model=model),),
    )


def _speed_for(speeds: tuple[SpeedFile, ...], size_gb: float, model: str) -> SpeedFile:
    """The testbed knows two sizes; a checkpoint runs like the one it is closer to."""
    like = "llama2-13b" if size_gb > 20 else "llama2-7b"
    found = next(speed for speed in speeds if speed.model == like)
    return replace(found, model=model)
