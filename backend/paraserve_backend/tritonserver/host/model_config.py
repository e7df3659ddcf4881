"""Rendering config.pbtxt from `model_repository_templates/` and reading it back.

Every text is parsed with Triton's own schema and compared with what was meant, so that a value can
never break out of its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from string import Template

from google.protobuf import text_format
from google.protobuf.text_encoding import CEscape
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup


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
