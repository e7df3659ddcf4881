"""Makes config.pbtxt: rendered from model_repository_templates/ for models, built for slots.

Every rendered text is parsed with Triton's own schema and compared with what was meant, so that a
value cannot change the rest of the file. Which models may be bound to a slot is decided here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from string import Template

from google.protobuf import text_format
from google.protobuf.text_encoding import CEscape
from tritonclient.grpc.model_config_pb2 import (
    DataType,
    ModelConfig,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
    ModelTransactionPolicy,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    name: str
    #: As config.pbtxt spells it, e.g. TYPE_INT32.
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What one rendered config must say."""

    template: str
    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    #: "cpu" or "cuda:<index>".
    device: str = "cpu"
    parameters: Mapping[str, str] = field(default_factory=dict)
    #: Models an ensemble calls, in order; `${step0}`, `${step1}` in its template.
    steps: tuple[str, ...] = ()


def render(meaning: Meaning) -> bytes:
    """The text of a config.pbtxt that says `meaning`."""
    values = {
        "name": _escape(meaning.name),
        "inputs": _tensor_block(meaning.inputs),
        "outputs": _tensor_block(meaning.outputs),
        "instance": _instance(meaning.device),
        "parameters": _parameter_block(meaning.parameters),
    }
    values |= {f"step{index}": _escape(name) for index, name in enumerate(meaning.steps)}
    text = _template(meaning.template).substitute(values)
    _check(meaning, text_format.Parse(text, ModelConfig()))
    return text.encode()


def _template(name: str) -> Template:
    folder = resources.files("paraserve_backend.tritonserver.host") / "templates"
    return Template((folder / f"{name}.pbtxt").read_text(encoding="utf-8"))


def _escape(value: str) -> str:
    return CEscape(value.encode(), as_utf8=False)


def _tensor_block(tensors: Iterable[Tensor]) -> str:
    return ",\n".join(
        f'  {{ name: "{_escape(tensor.name)}" data_type: {tensor.datatype} '
        f"dims: {list(tensor.dims)}{' optional: true' if tensor.optional else ''} }}"
        for tensor in tensors
    )


def _parameter_block(parameters: Mapping[str, str]) -> str:
    return "\n".join(
        f'parameters {{ key: "{_escape(key)}" value {{ string_value: "{_escape(value)}" }} }}'
        for key, value in parameters.items()
    )


def _instance(device: str) -> str:
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return "{ count: 1 kind: KIND_CPU }"
    return f"{{ count: 1 kind: KIND_GPU gpus: [ {int(index)} ] }}"


def _check(meaning: Meaning, config: ModelConfig) -> None:
    """Compare the parsed text with what was meant; a difference is an error in a template."""
    parsed = Meaning(
        template=meaning.template,
        name=config.name,
        inputs=tuple(
            Tensor(
                name=tensor.name,
                datatype=DataType.Name(tensor.data_type),
                dims=tuple(tensor.dims),
                optional=tensor.optional,
            )
            for tensor in config.input
        ),
        outputs=tuple(
            Tensor(
                name=tensor.name,
                datatype=DataType.Name(tensor.data_type),
                dims=tuple(tensor.dims),
            )
            for tensor in config.output
        ),
        device=_device(config),
        parameters={key: value.string_value for key, value in config.parameters.items()},
        steps=tuple(step.model_name for step in config.ensemble_scheduling.step),
    )
    if parsed != meaning:
        raise ValueError(f"template {meaning.template}.pbtxt says {parsed}, meant was {meaning}")


def _device(config: ModelConfig) -> str:
    for group in config.instance_group:
        if group.kind == ModelInstanceGroup.KIND_GPU:
            return f"cuda:{group.gpus[0]}"
    return "cpu"


CONFIG_FILE = "config.pbtxt"
#: A model's folder must have a version.
VERSION_FILE = "1/.keep"
_KIND_OF_ROLE = {role.value: kind for kind, role in SLOT_ROLE.items()}
_BATCH = TensorSpec(name=FORWARD_BATCH, datatype="UINT8", shape=(-1,))
_TOKEN_IDS = TensorSpec(name=FORWARD_TOKEN_IDS, datatype="INT32", shape=(-1,))
_HIDDEN = TensorSpec(name=FORWARD_HIDDEN, datatype="UINT8", shape=(-1, -1))
_RESULT = TensorSpec(name=FORWARD_RESULT, datatype="UINT8", shape=(-1,))
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


def slotted_model(files: Mapping[str, bytes]) -> SlottedModel | None:
    """Read a model's files; `None` where it needs a process of its own, or none at all."""
    config = _parse(files)
    if config is None or config.backend != "paraserve":
        return None
    parameters = {key: value.string_value for key, value in config.parameters.items()}
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
    return {**files, CONFIG_FILE: text_format.MessageToString(config).encode()}


def slot_files(name: str, place: SlotPlace, run_dir: str) -> Mapping[str, bytes]:
    """Return the files of an idle slot's model."""
    inputs, outputs = _TENSORS[place.kind]
    config = ModelConfig(
        name=name,
        backend="paraserve",
        # None is required: commands have no tensors.
        input=[
            ModelInput(
                name=tensor.name, data_type=_datatype(tensor), dims=tensor.shape, optional=True
            )
            for tensor in inputs
        ],
        output=[
            ModelOutput(name=tensor.name, data_type=_datatype(tensor), dims=tensor.shape)
            for tensor in outputs
        ],
        instance_group=[_instance_group(place.device)],
        model_transaction_policy=ModelTransactionPolicy(decoupled=place.kind is SlotKind.FRONT),
    )
    settings = {
        "role": Role.SLOT.value,
        "kind": place.kind.value,
        "device": place.device,
        "run_dir": run_dir,
    }
    for key, value in settings.items():
        config.parameters[key].string_value = value
    return {CONFIG_FILE: text_format.MessageToString(config).encode(), VERSION_FILE: b""}


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


def _datatype(tensor: TensorSpec) -> DataType.ValueType:
    return DataType.Value(tensor.config_datatype)


def _instance_group(device: str) -> ModelInstanceGroup:
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return ModelInstanceGroup(count=1, kind=ModelInstanceGroup.KIND_CPU)
    return ModelInstanceGroup(count=1, kind=ModelInstanceGroup.KIND_GPU, gpus=[int(index)])
