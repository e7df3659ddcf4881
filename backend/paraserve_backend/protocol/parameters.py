"""The parameters of a Triton model of backend `paraserve` as typed settings of its role.

All reading of these parameters is here. The scheduler renders them into config.pbtxt from
model_repository_templates/; users write the standalone form by hand. None of them is secret: keys
are in files that the parameters name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.names import EngineName, Role, SlotKind
from paraserve_backend.protocol.run_dir import RunDir

#: Deployment and replica of a model that a user configures by hand.
STANDALONE = "standalone"
_LAYERS = re.compile(r"(\d+):(\d+)/(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Where a model finds its weights: a fetch the agent runs, or a source it reads itself."""

    run_dir: Path | None
    fetch_id: str | None
    source: str | None
    endpoint_url: str | None
    region: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvConfig:
    """KV cache: the same `num_blocks` of `block_size` tokens on every stage of a replica."""

    #: `None`: enough for `max_sequences` full contexts, as a standalone instance does.
    num_blocks: int | None
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelConfig:
    """A model's place in the activation channel: it binds `listen` and connects to `next`."""

    listen: str
    next: str
    key_file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOverConfig:
    """Where other replicas of the deployment reach this one."""

    #: `tcp://host:port`
    inbox: str
    key_file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    deployment: str
    replica: str
    weights: WeightsConfig
    kv: KvConfig
    device: str
    #: The ensemble that is one forward pass; `None`: this model holds all layers itself.
    forward_model: str | None
    #: `None`: the model's own limit.
    max_context: int | None
    max_sequences: int
    max_batch_tokens: int
    batches_in_flight: int
    #: `None`: requests stay where they are.
    hand_over: HandOverConfig | None
    #: "paraserve", or one that `roles.external` knows.
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    replica: str
    layers: LayerRange
    weights: WeightsConfig
    kv: KvConfig
    device: str
    #: `None` for the first stage, which Triton feeds.
    channel: ChannelConfig | None
    #: The deployment's, for sending KV blocks to other replicas; `None`: it cannot.
    key_file: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    replica: str
    channel: ChannelConfig
    forward_timeout_s: float
    #: The agent's.
    run_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotConfig:
    """A process without weights that becomes one model after the other."""

    kind: SlotKind
    device: str
    #: The agent's; fetches and keys of what is bound here lie below it.
    run_dir: Path


RoleConfig = GenerateConfig | StageConfig | LinkConfig


def parse_layers(text: str) -> LayerRange:
    """Read `"4:8/16"`: layers [4, 8) of 16."""
    match = _LAYERS.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"Parameter 'layers' is {text!r}; write it as start:end/total.")
    start, end, total = (int(group) for group in match.groups())
    return LayerRange(start=start, end=end, total=total)


def format_layers(layers: LayerRange) -> str:
    return f"{layers.start}:{layers.end}/{layers.total}"


def read_config(model_config: str) -> RoleConfig | SlotConfig:
    """Turn Triton's `model_config` JSON into the settings of the role it names.

    Raises:
        InvalidRequest: a parameter is missing or malformed.
    """
    raw = json.loads(model_config)["parameters"]
    values = {key: value["string_value"] for key, value in raw.items()}
    if values.get("role") == Role.SLOT:
        return _slot(_Parameters(values))
    return read_parameters(values)


def read_parameters(values: Mapping[str, str]) -> RoleConfig:
    """Turn a config.pbtxt's parameters into the settings of the role they name.

    Raises:
        InvalidRequest: a parameter is missing or malformed.
    """
    parameters = _Parameters(values)
    role = parameters.text("role")
    if role == Role.GENERATE:
        return _generate(parameters)
    if role == Role.STAGE:
        return _stage(parameters)
    if role == Role.LINK:
        return _link(parameters)
    raise InvalidRequest(f"Parameter 'role' is {role!r}; use one of {', '.join(Role)}.")


class _Parameters:
    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def optional(self, name: str) -> str | None:
        return self._values.get(name) or None

    def text(self, name: str) -> str:
        value = self.optional(name)
        if value is None:
            raise InvalidRequest(f"Parameter {name!r} is missing from config.pbtxt.")
        return value

    def optional_integer(self, name: str) -> int | None:
        value = self.optional(name)
        if value is None:
            return None
        if not value.isdecimal() or int(value) == 0:
            raise InvalidRequest(f"Parameter {name!r} is {value!r}; it takes a whole number > 0.")
        return int(value)

    def integer(self, name: str, default: int) -> int:
        return self.optional_integer(name) or default

    def seconds(self, name: str) -> float:
        value = self.text(name)
        try:
            return float(value)
        except ValueError:
            raise InvalidRequest(f"Parameter {name!r} is {value!r}; it takes seconds.") from None


def _weights(parameters: _Parameters) -> WeightsConfig:
    run_dir = parameters.optional("run_dir")
    weights = WeightsConfig(
        run_dir=Path(run_dir) if run_dir else None,
        fetch_id=parameters.optional("fetch_id"),
        source=parameters.optional("source"),
        endpoint_url=parameters.optional("endpoint_url"),
        region=parameters.optional("region"),
    )
    if weights.source is None and (weights.run_dir is None or weights.fetch_id is None):
        raise InvalidRequest(
            "config.pbtxt names no weights: set parameter 'source' to s3://bucket/prefix or to a "
            "folder."
        )
    return weights


def _kv(parameters: _Parameters) -> KvConfig:
    return KvConfig(
        num_blocks=parameters.optional_integer("kv_blocks"),
        block_size=parameters.integer("block_size", 16),
    )


def _channel(parameters: _Parameters) -> ChannelConfig:
    return ChannelConfig(
        listen=parameters.text("listen"),
        next=parameters.text("next"),
        key_file=Path(parameters.text("key_file")),
    )


def _generate(parameters: _Parameters) -> GenerateConfig:
    return GenerateConfig(
        deployment=parameters.optional("deployment") or STANDALONE,
        replica=parameters.optional("replica") or STANDALONE,
        weights=_weights(parameters),
        kv=_kv(parameters),
        device=parameters.optional("device") or "cpu",
        forward_model=parameters.optional("forward_model"),
        max_context=parameters.optional_integer("max_context"),
        max_sequences=parameters.integer("max_sequences", 16),
        max_batch_tokens=parameters.integer("max_batch_tokens", 512),
        batches_in_flight=parameters.integer("batches_in_flight", 1),
        hand_over=_hand_over(parameters),
        engine=parameters.optional("engine") or EngineName.PARASERVE,
    )


def _hand_over(parameters: _Parameters) -> HandOverConfig | None:
    inbox = parameters.optional("hand_over")
    if inbox is None:
        return None
    return HandOverConfig(inbox=inbox, key_file=Path(parameters.text("key_file")))


def _stage(parameters: _Parameters) -> StageConfig:
    layers = parse_layers(parameters.text("layers"))
    key_file = parameters.optional("key_file")
    return StageConfig(
        replica=parameters.text("replica"),
        layers=layers,
        weights=_weights(parameters),
        kv=_kv(parameters),
        device=parameters.optional("device") or "cpu",
        channel=None if layers.is_first else _channel(parameters),
        key_file=Path(key_file) if key_file else None,
    )


def _slot(parameters: _Parameters) -> SlotConfig:
    return SlotConfig(
        kind=SlotKind(parameters.text("kind")),
        device=parameters.text("device"),
        run_dir=Path(parameters.text("run_dir")),
    )


def _link(parameters: _Parameters) -> LinkConfig:
    run_dir = parameters.optional("run_dir")
    return LinkConfig(
        replica=parameters.text("replica"),
        channel=_channel(parameters),
        forward_timeout_s=parameters.seconds("forward_timeout_s"),
        run_dir=Path(run_dir) if run_dir else None,
    )


def run_dir_of(config: RoleConfig | SlotConfig) -> RunDir | None:
    """Return the run_dir of the agent that loads this model; `None`: there is no agent."""
    match config:
        case SlotConfig() | LinkConfig():
            path = config.run_dir
        case GenerateConfig() | StageConfig():
            path = config.weights.run_dir
    return None if path is None else RunDir(path)
