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
from paraserve_backend.tritonserver.host.model_config import Meaning, Tensor, render
from paraserve_scheduler.state.plans import ReplicaPlan, StagePlan

#: A version folder must exist and the agent makes folders for files only.
_VERSION_FILE = "1/.keep"
#: The generate loop names this model, but does not need it to load.
_FORWARD_WAVE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonModel:
    name: str
    #: Path inside the model's folder to content.
    files: Mapping[str, bytes]
    #: Lower waves are ready before a higher one is loaded.
    load_wave: int = 0


_BATCH = Tensor(name=FORWARD_BATCH, datatype="TYPE_UINT8", dims=(-1,))
_TOKEN_IDS = Tensor(name=FORWARD_TOKEN_IDS, datatype="TYPE_INT32", dims=(-1,))
_RESULT = Tensor(name=FORWARD_RESULT, datatype="TYPE_UINT8", dims=(-1,))


def stage_models(plan: ReplicaPlan, model: ModelSpec, stage: int) -> tuple[TritonModel, ...]:
    """All models that the node of `stage` serves for this replica."""
    if len(plan.stages) == 1:
        return (_model(_whole_model(plan)),)
    own = _model(_stage(plan, model, stage))
    if stage > 0:
        return (own,)
    forward = _model(_forward(plan), load_wave=_FORWARD_WAVE)
    return (own, _model(_link(plan, model)), forward, _model(_front(plan)))


# ---- what each role's config means ----


def _whole_model(plan: ReplicaPlan) -> Meaning:
    return _generate(plan, {"engine": plan.engine.value})


def _front(plan: ReplicaPlan) -> Meaning:
    pipeline = {
        "forward_model": plan.models.forward,
        "batches_in_flight": str(len(plan.stages)),
    }
    return _generate(plan, pipeline)


def _generate(plan: ReplicaPlan, own: dict[str, str]) -> Meaning:
    parameters = {
        "role": Role.GENERATE.value,
        "deployment": plan.deployment,
        "hand_over": plan.hand_over.url,
        "max_context": str(plan.max_context),
        "max_sequences": str(plan.max_sequences),
        "max_batch_tokens": str(plan.max_batch_tokens),
    }
    return Meaning(
        template="generate",
        name=plan.models.generate,
        inputs=tuple(map(_interface_tensor, INPUTS)),
        # Triton has no optional outputs: one that is not sent is simply not there.
        outputs=tuple(
            _interface_tensor(spec, is_output=True) for spec in (*OUTPUTS, *HAND_OVER_OUTPUTS)
        ),
        device=plan.head.device,
        parameters=parameters | _weights(plan, 0) | own,
    )


def _stage(plan: ReplicaPlan, model: ModelSpec, stage: int) -> Meaning:
    layers = plan.stages[stage].layers
    hidden = _hidden(model)
    parameters = {"role": Role.STAGE.value, "layers": format_layers(layers)}
    if stage > 0:
        parameters |= _channel(plan, stage)
    return Meaning(
        template="stage",
        name=plan.models.stage(stage),
        inputs=(_BATCH, _TOKEN_IDS if layers.is_first else hidden),
        outputs=(_RESULT if layers.is_last else hidden,),
        device=plan.stages[stage].device,
        parameters=parameters | _weights(plan, stage),
    )


def _link(plan: ReplicaPlan, model: ModelSpec) -> Meaning:
    parameters = {
        "role": Role.LINK.value,
        "replica": plan.replica,
        "forward_timeout_s": str(plan.forward_timeout_s),
    }
    return Meaning(
        template="link",
        name=plan.models.link,
        inputs=(_BATCH, _hidden(model)),
        outputs=(_RESULT,),
        parameters=parameters | {"key_file": _key_file(plan, 0)} | _channel(plan, 0),
    )


def _forward(plan: ReplicaPlan) -> Meaning:
    return Meaning(
        template="forward",
        name=plan.models.forward,
        inputs=(_BATCH, _TOKEN_IDS),
        outputs=(_RESULT,),
        steps=(plan.models.stage(0), plan.models.link),
    )


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


def _hidden(model: ModelSpec) -> Tensor:
    # Raw bytes: BF16 has no numpy type, so a Python model could not take it as a tensor.
    row_bytes = model.hidden_size * DTYPE_BYTES[model.dtype]
    return Tensor(name=FORWARD_HIDDEN, datatype="TYPE_UINT8", dims=(-1, row_bytes))


def _interface_tensor(spec: TensorSpec, *, is_output: bool = False) -> Tensor:
    return Tensor(
        name=spec.name,
        datatype=spec.config_datatype,
        dims=spec.shape,
        optional=spec.optional and not is_output,
    )


def _model(meaning: Meaning, *, load_wave: int = 0) -> TritonModel:
    files = {"config.pbtxt": render(meaning), _VERSION_FILE: b""}
    return TritonModel(name=meaning.name, files=files, load_wave=load_wave)
