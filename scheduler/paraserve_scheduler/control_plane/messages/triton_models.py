"""Which Triton models a node gets for a replica, their names, and what their config.pbtxt says.

The text is rendered by `tritonserver.host.model_config`; the agent writes it to disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.architectures.spec import DTYPE_BYTES, ModelSpec
from paraserve_backend.protocol.names import (
    FORWARD_BATCH,
    FORWARD_HIDDEN,
    FORWARD_RESULT,
    FORWARD_TOKEN_IDS,
    Role,
    fetch_id,
)
from paraserve_backend.protocol.parameters import format_layers
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.protocol.tensors import (
    HAND_OVER_OUTPUTS,
    INPUTS,
    OUTPUTS,
    TensorSpec,
)
from paraserve_backend.tritonserver.host.model_config import (
    CONFIG_FILE,
    VERSION_FILE,
    render,
    render_ensemble,
)
from paraserve_scheduler.state.plans import ReplicaPlan, StagePlan

#: The generate loop names this model, but does not need it to load.
_FORWARD_WAVE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonModel:
    name: str
    #: Path inside the model's folder to content.
    files: Mapping[str, bytes]
    #: Lower waves are ready before a higher one is loaded.
    load_wave: int = 0


_BATCH = TensorSpec(name=FORWARD_BATCH, datatype="UINT8", shape=(-1,), optional=False)
_TOKEN_IDS = TensorSpec(name=FORWARD_TOKEN_IDS, datatype="INT32", shape=(-1,), optional=False)
_RESULT = TensorSpec(name=FORWARD_RESULT, datatype="UINT8", shape=(-1,))


def stage_models(plan: ReplicaPlan, model: ModelSpec, stage: int) -> tuple[TritonModel, ...]:
    """All models that the node of `stage` serves for this replica."""
    if len(plan.stages) == 1:
        return (_whole_model(plan),)
    own = _stage(plan, model, stage)
    if stage > 0:
        return (own,)
    return (own, _link(plan, model), _forward(plan), _front(plan))


# ---- what each role's config says ----


def _whole_model(plan: ReplicaPlan) -> TritonModel:
    return _generate(plan, {"engine": plan.engine.value})


def _front(plan: ReplicaPlan) -> TritonModel:
    pipeline = {
        "forward_model": plan.models.forward,
        "batches_in_flight": str(len(plan.stages)),
    }
    return _generate(plan, pipeline)


def _generate(plan: ReplicaPlan, own: dict[str, str]) -> TritonModel:
    parameters = {
        "role": Role.GENERATE.value,
        "deployment": plan.deployment,
        "hand_over": plan.hand_over.url,
        "max_context": str(plan.max_context),
        "max_sequences": str(plan.max_sequences),
        "max_batch_tokens": str(plan.max_batch_tokens),
    }
    config = render(
        "generate",
        name=plan.models.generate,
        inputs=INPUTS,
        outputs=(*OUTPUTS, *HAND_OVER_OUTPUTS),
        device=plan.head.device,
        parameters=parameters | _weights(plan, 0) | own,
    )
    return _model(plan.models.generate, config)


def _stage(plan: ReplicaPlan, model: ModelSpec, stage: int) -> TritonModel:
    layers = plan.stages[stage].layers
    hidden = _hidden(model)
    parameters = {"role": Role.STAGE.value, "layers": format_layers(layers)}
    if stage > 0:
        parameters |= _channel(plan, stage)
    name = plan.models.stage(stage)
    config = render(
        "stage",
        name=name,
        inputs=(_BATCH, _TOKEN_IDS if layers.is_first else hidden),
        outputs=(_RESULT if layers.is_last else hidden,),
        device=plan.stages[stage].device,
        parameters=parameters | _weights(plan, stage),
    )
    return _model(name, config)


def _link(plan: ReplicaPlan, model: ModelSpec) -> TritonModel:
    parameters = {
        "role": Role.LINK.value,
        "replica": plan.replica,
        "run_dir": plan.head.run_dir,
        "forward_timeout_s": str(plan.forward_timeout_s),
    }
    config = render(
        "link",
        name=plan.models.link,
        inputs=(_BATCH, _hidden(model)),
        outputs=(_RESULT,),
        parameters=parameters | {"key_file": _key_file(plan, 0)} | _channel(plan, 0),
        device="cpu",
    )
    return _model(plan.models.link, config)


def _forward(plan: ReplicaPlan) -> TritonModel:
    config = render_ensemble(
        "forward",
        name=plan.models.forward,
        inputs=(_BATCH, _TOKEN_IDS),
        outputs=(_RESULT,),
        steps=(plan.models.stage(0), plan.models.link),
    )
    return _model(plan.models.forward, config, load_wave=_FORWARD_WAVE)


def _weights(plan: ReplicaPlan, stage: int) -> dict[str, str]:
    own: StagePlan = plan.stages[stage]
    return {
        "replica": plan.replica,
        "run_dir": own.run_dir,
        "fetch_id": fetch_id(plan.replica, stage),
        "device": own.device,
        "kv_blocks": str(plan.kv_blocks),
        "block_size": str(plan.block_size),
        "key_file": _key_file(plan, stage),
    }


def _channel(plan: ReplicaPlan, stage: int) -> dict[str, str]:
    """The place in the ring: head's link, stage 1, ..., last stage, head's link."""
    ring = [plan.results, *(other.listen for other in plan.stages[1:])]
    urls = [address.url for address in ring if address is not None]
    return {
        "listen": urls[stage],
        "next": urls[(stage + 1) % len(urls)],
    }


def _key_file(plan: ReplicaPlan, stage: int) -> str:
    run_dir = RunDir(Path(plan.stages[stage].run_dir))
    return str(run_dir.key_file(plan.replica))


def _hidden(model: ModelSpec) -> TensorSpec:
    # Raw bytes: BF16 has no numpy type, so a Python model could not take it as a tensor.
    row_bytes = model.hidden_size * DTYPE_BYTES[model.dtype]
    return TensorSpec(name=FORWARD_HIDDEN, datatype="UINT8", shape=(-1, row_bytes), optional=False)


def _model(name: str, config: bytes, *, load_wave: int = 0) -> TritonModel:
    return TritonModel(
        name=name, files={CONFIG_FILE: config, VERSION_FILE: b""}, load_wave=load_wave
    )
