"""Makes config.pbtxt of models and slots, from the templates in model_repository_templates/.

A template is parsed with Triton's own schema, fields of the message are set, and the message is
printed. So a value cannot change the rest of the file. Which models may be bound to a slot is
decided here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import (
    DataType,
    ModelConfig,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
)

from paraserve_backend.protocol.names import (
    FORWARD_BATCH,
    FORWARD_HIDDEN,
    FORWARD_RESULT,
    FORWARD_TOKEN_IDS,
    SLOT_ROLE,
    EngineName,
    Role,
    SlotKind,
)
from paraserve_backend.protocol.tensors import (
    HAND_OVER_OUTPUTS,
    INPUTS,
    OUTPUTS,
    TensorSpec,
)

CONFIG_FILE = "config.pbtxt"
#: A model's folder must have a version.
VERSION_FILE = "1/.keep"
_KIND_OF_ROLE = {role.value: kind for kind, role in SLOT_ROLE.items()}
_BATCH = TensorSpec(name=FORWARD_BATCH, datatype="UINT8", shape=(-1,))
_TOKEN_IDS = TensorSpec(name=FORWARD_TOKEN_IDS, datatype="INT32", shape=(-1,))
_HIDDEN = TensorSpec(name=FORWARD_HIDDEN, datatype="UINT8", shape=(-1, -1))
_RESULT = TensorSpec(name=FORWARD_RESULT, datatype="UINT8", shape=(-1,))
_TEMPLATE = {SlotKind.FRONT: "generate", SlotKind.STAGE: "stage", SlotKind.LINK: "link"}
#: What a slot takes and gives is what any model that it may become does.
_TENSORS: Mapping[SlotKind, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
    SlotKind.FRONT: (INPUTS, (*OUTPUTS, *HAND_OVER_OUTPUTS)),
    SlotKind.STAGE: ((_BATCH, _TOKEN_IDS, _HIDDEN), (_HIDDEN, _RESULT)),
    SlotKind.LINK: ((_BATCH, _HIDDEN), (_RESULT,)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPlace:
    """Where a model fits: any idle slot of this kind on this device ("cpu", "cuda:<index>")."""

    kind: SlotKind
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlottedModel:
    """A model that can be bound to a slot instead of being loaded."""

    place: SlotPlace
    #: Of its config.pbtxt.
    parameters: Mapping[str, str]


def render(
    template: str,
    *,
    name: str,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    parameters: Mapping[str, str],
    device: str,
) -> bytes:
    """Return the config.pbtxt of a model that runs on `device` ("cpu", "cuda:<index>")."""
    config = _from_template(template, name, inputs, outputs)
    config.instance_group.append(_instance_group(device))
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return _text(config)


def render_ensemble(
    template: str,
    *,
    name: str,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    steps: Sequence[str],
) -> bytes:
    """Return the config.pbtxt of an ensemble that calls the models `steps`, in this order."""
    config = _from_template(template, name, inputs, outputs)
    for step, model in zip(config.ensemble_scheduling.step, steps, strict=True):
        step.model_name = model
    return _text(config)


def own_parameters(files: Mapping[str, bytes]) -> Mapping[str, str] | None:
    """Return the parameters of a model of our backend by its files; `None`: it is of another."""
    config = _parse(files)
    if config is None or config.backend != "paraserve":
        return None
    return {key: value.string_value for key, value in config.parameters.items()}


def slotted_model(files: Mapping[str, bytes]) -> SlottedModel | None:
    """Read a model's files; `None` where it needs a process of its own, or none at all."""
    parameters = own_parameters(files)
    if parameters is None:
        return None
    kind = _KIND_OF_ROLE.get(parameters.get("role", ""))
    engine = parameters.get("engine", EngineName.PARASERVE)
    if kind is None or engine != EngineName.PARASERVE:
        return None
    device = "cpu" if kind is SlotKind.LINK else parameters.get("device", "cpu")
    return SlottedModel(place=SlotPlace(kind=kind, device=device), parameters=parameters)


def with_steps(files: Mapping[str, bytes], slots: Mapping[str, str]) -> Mapping[str, bytes]:
    """Return an ensemble's files with those of its steps renamed that are slots now."""
    config = _parse(files)
    if config is None or not config.HasField("ensemble_scheduling"):
        return files
    for step in config.ensemble_scheduling.step:
        step.model_name = slots.get(step.model_name, step.model_name)
    return {**files, CONFIG_FILE: _text(config)}


def slot_files(name: str, place: SlotPlace, run_dir: str) -> Mapping[str, bytes]:
    """Return the files of an idle slot's model."""
    inputs, outputs = _TENSORS[place.kind]
    config = render(
        _TEMPLATE[place.kind],
        name=name,
        # None is required: commands have no tensors.
        inputs=[replace(tensor, optional=True) for tensor in inputs],
        outputs=outputs,
        parameters={
            "role": Role.SLOT.value,
            "kind": place.kind.value,
            "device": place.device,
            "run_dir": run_dir,
        },
        device=place.device,
    )
    return {CONFIG_FILE: config, VERSION_FILE: b""}


def places(devices: Iterable[str]) -> tuple[SlotPlace, ...]:
    """Return the places of one set on each device; a link computes nothing, so it has none."""
    on_device = [
        SlotPlace(kind=kind, device=device)
        for device in devices
        for kind in (SlotKind.FRONT, SlotKind.STAGE)
    ]
    return (*on_device, SlotPlace(kind=SlotKind.LINK, device="cpu"))


def _parse(files: Mapping[str, bytes]) -> ModelConfig | None:
    try:
        return text_format.Parse(files.get(CONFIG_FILE, b"").decode(), ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError):
        return None  # Triton says what is wrong with it


@cache
def _template(name: str) -> ModelConfig:
    folder = resources.files("paraserve_backend.tritonserver.host") / "templates"
    text = (folder / f"{name}.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, ModelConfig())


def _from_template(
    template: str, name: str, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> ModelConfig:
    config = ModelConfig(name=name)
    config.MergeFrom(_template(template))
    for tensor in inputs:
        config.input.append(
            ModelInput(
                name=tensor.name,
                data_type=_datatype(tensor),
                dims=tensor.shape,
                optional=tensor.optional,
            )
        )
    # Triton has no optional outputs: one that is not sent is simply not there.
    for tensor in outputs:
        config.output.append(
            ModelOutput(name=tensor.name, data_type=_datatype(tensor), dims=tensor.shape)
        )
    return config


def _text(config: ModelConfig) -> bytes:
    return text_format.MessageToString(config, as_utf8=False).encode()


def _datatype(tensor: TensorSpec) -> DataType.ValueType:
    return DataType.Value(tensor.config_datatype)


def _instance_group(device: str) -> ModelInstanceGroup:
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return ModelInstanceGroup(count=1, kind=ModelInstanceGroup.KIND_CPU)
    return ModelInstanceGroup(count=1, kind=ModelInstanceGroup.KIND_GPU, gpus=[int(index)])
