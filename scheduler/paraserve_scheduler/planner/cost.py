"""What starting and serving a model takes: seconds and memory, from constants of a kind of node.

Pure formulas. The constants are measured elsewhere and passed in; `planner.planner` chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

#: Layers `[start, end)`, disjoint and ascending.
LayerRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartMethod:
    """How a worker process comes up on one kind of node, measured.

    `stage_ready_s` says how the constants combine.
    """

    #: From the command to a process that can take in weights: container, imports, GPU context.
    runtime_s: float
    #: From the last byte and the process to the first forward pass, whatever the size.
    tail_s: float
    #: Of the tail, what grows with the stage's bytes: copies into the GPU, building the modules.
    load_s_per_byte: float
    #: Joining a pipeline's stages; nothing with one stage.
    pipeline_setup_s: float = 0.0
    #: Fetching and starting the process go on at the same time.
    is_overlapped: bool = True
    #: What a process waiting without weights (a runtime slot) still needs; None: no slots here.
    slot_runtime_s: float | None = None
    #: GPU memory that such a process holds.
    slot_bytes: int = 0
    #: Weights come at no cost; only for an upper bound of what a cluster can give.
    is_instant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One model alone on one kind of GPU."""

    prefill_s_per_token: float
    #: One decode step with one sequence, and how much each further sequence adds.
    decode_s: float
    decode_s_per_sequence: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """Constants of one kind of node."""

    name: str
    start: StartMethod
    #: By model.
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    #: From a stage to the next, per forward pass.
    hop_s: float = 0.001
    #: Of weights from disk into host memory; 0: nothing is kept on disk.
    disk_bytes_per_s: float = 0.0
    #: Replicas share a GPU, and one that reserves a part of it gets that part of its speed.
    shares_gpus: bool = True


# Compared and hashed by identity: one exists per model.
@dataclass(frozen=True, kw_only=True, eq=False)
class ModelShape:
    """Bytes of a model by layer. The first layer's include the embedding, the last's the head."""

    name: str
    layer_bytes: tuple[int, ...]
    #: KV cache that one replica reserves over all layers.
    kv_bytes: int
    #: Of a head that is also the embedding: a last stage that is not the first has it as well.
    tied_bytes: int = 0
    #: Of the small files, which every stage has.
    file_bytes: int = 0

    @cached_property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    @cached_property
    def prefix_bytes(self) -> tuple[int, ...]:
        """`prefix_bytes[i]`: weights of the layers before layer i."""
        return (0, *accumulate(self.layer_bytes))

    @cached_property
    def total_bytes(self) -> int:
        return self.prefix_bytes[-1]

    def bytes_of(self, start: int, end: int) -> int:
        copied = self.tied_bytes if start > 0 and end == self.num_layers else 0
        return self.prefix_bytes[end] - self.prefix_bytes[start] + copied

    def reserved_bytes(self, start: int, end: int) -> int:
        """Weights of layers `[start, end)`, small files and the layers' share of the KV cache."""
        kv_bytes = self.kv_bytes * (end - start) // self.num_layers
        return self.bytes_of(start, end) + self.file_bytes + kv_bytes

    @cached_property
    def least_reserved_bytes(self) -> int:
        """What the smallest stage reserves, that of one layer."""
        return min(self.reserved_bytes(layer, layer + 1) for layer in range(self.num_layers))

    @cached_property
    def full_bytes(self) -> int:
        """What a worker reserves that is to hold the whole model."""
        return self.total_bytes + self.file_bytes + self.kv_bytes


def uniform_model(
    name: str, *, size_bytes: int, num_layers: int, ends_bytes: int, kv_bytes: int
) -> ModelShape:
    """Return a model of equal layers with `ends_bytes` each for its embedding and its head."""
    layer = (size_bytes - 2 * ends_bytes) // num_layers
    sizes = [layer] * num_layers
    sizes[0] += ends_bytes
    sizes[-1] += size_bytes - layer * num_layers - ends_bytes
    return ModelShape(name=name, layer_bytes=tuple(sizes), kv_bytes=kv_bytes)


def runtime_s(method: StartMethod, *, has_slot: bool) -> float:
    """Until a process can take in weights; from a slot only being told what to load is left."""
    if has_slot and method.slot_runtime_s is not None:
        return method.slot_runtime_s
    return method.runtime_s


def stage_ready_s(
    method: StartMethod, *, fetch_s: float, size_bytes: int, has_slot: bool, in_pipeline: bool
) -> float:
    """Seconds from the command until a stage of `size_bytes` can run a forward pass.

    `max(runtime, fetch) + tail + bytes · load` where both go on together, their sum where they do
    not. The form is the one that HydraServe's cold starts show: with one worker time over the
    link's is constant, with four it does not fall below the runtime's (their Figure 7); HydraServe
    itself reckons with `fetch + 2 s`. ServerlessLLM's estimate `q + n / b` is the same sum
    without a runtime.
    """
    if method.is_instant:
        return 0.0
    start = runtime_s(method, has_slot=has_slot)
    both = max(start, fetch_s) if method.is_overlapped else start + fetch_s
    setup = method.pipeline_setup_s if in_pipeline else 0.0
    return both + method.tail_s + size_bytes * method.load_s_per_byte + setup


def pipeline_factor(stages: int, full: int) -> float:
    """How many times slower than one worker a pipeline runs a pass; hops not counted.

    HydraServe's `(s - w) + w / s`: a full worker has its GPU for itself and takes 1/s of the whole
    model's time; a worker that reserves a part of a GPU gets about that part of its speed.
    """
    return (stages - full) + full / stages


def slowest(kinds: Sequence[NodeKind], model: str) -> tuple[Speed, float]:
    """The speed and the hop of a pipeline over nodes of these kinds: those of the slowest."""
    speed = max((kind.speeds[model] for kind in kinds), key=lambda speed: speed.decode_s)
    return speed, max(kind.hop_s for kind in kinds)


def full_speed_stages(kinds: Sequence[NodeKind], stages: int, full: int) -> int:
    """Stages with the whole speed of their device: full workers, or all where none is shared."""
    return full if any(kind.shares_gpus for kind in kinds) else stages


def prefill_s(speed: Speed, tokens: int, *, stages: int, full: int, hop_s: float) -> float:
    """Seconds of the forward pass over a prompt."""
    factor = pipeline_factor(stages, full)
    return speed.prefill_s_per_token * tokens * factor + hop_s * (stages - 1)


def decode_s(speed: Speed, batch: int, *, stages: int, full: int, hop_s: float) -> float:
    """Seconds of one decode step of `batch` sequences: their time per output token."""
    alone = speed.decode_s + speed.decode_s_per_sequence * (batch - 1)
    return alone * pipeline_factor(stages, full) + hop_s * (stages - 1)
