"""The index of a Hugging Face model folder: its configuration, and the bytes of each tensor.

It is read from headers and configuration, never from weights, and is stored when a model is
deployed, so that a cold start reads no header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec

from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel
from paraserve_backend.weights.checkpoint.safetensors import (
    LENGTH_BYTES,
    TensorEntry,
    header_end,
    is_text,
    parse_header,
)
from paraserve_backend.weights.sources.base import (
    UNKNOWN_STORE,
    Source,
    StoredObject,
    StoreIdentity,
)
from paraserve_backend.weights.sources.retry import read_range

CONFIG = "config.json"
#: Files that a replica needs whole besides the weights, where they are there.
SMALL_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_SINGLE = "model.safetensors"
_SHARD_MAP = "model.safetensors.index.json"
#: First read of a file: one request is enough for nearly every header.
_FIRST_READ_BYTES = 256 << 10
#: The longest real shard maps have a tenth of it.
_MAX_JSON_BYTES = 100_000_000
_CONCURRENT_READS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """One model folder in one version.

    `files` are the small files that exist, `objects` those that hold `tensors`. `config` is
    config.json as parsed.
    """

    source_uri: str
    config: Mapping[str, Any]
    files: tuple[StoredObject, ...]
    objects: tuple[StoredObject, ...]
    tensors: Mapping[str, TensorEntry]
    #: Where the source was read, and as whom. An index of an earlier version does not say: until
    #: the model is deployed again, the scheduler finds none of its weights on any node.
    store: StoreIdentity = UNKNOWN_STORE

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def to_json(self) -> bytes:
        record = _StoredIndex(
            source_uri=self.source_uri,
            config=self.config,
            files=self.files,
            objects=self.objects,
            tensors=tuple(self.tensors.values()),
            store=self.store,
        )
        # A config.json may have NaN and Infinity, which msgspec cannot write.
        return json.dumps(msgspec.to_builtins(record), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> CheckpointIndex:
        """Read what `to_json` wrote; raises `InvalidCheckpoint` for anything else."""
        try:
            record = msgspec.convert(json.loads(text), _StoredIndex)
        except ValueError as error:
            raise InvalidCheckpoint(
                f"not a checkpoint index of this version ({error!r}): deploy the model again"
            ) from None
        return cls(
            source_uri=record.source_uri,
            config=record.config,
            files=record.files,
            objects=record.objects,
            tensors={tensor.name: tensor for tensor in record.tensors},
            store=record.store,
        )


class _StoredIndex(msgspec.Struct, frozen=True, kw_only=True):
    """A `CheckpointIndex` as JSON has it: its tensors are a list."""

    source_uri: str
    config: Mapping[str, Any]
    files: tuple[StoredObject, ...]
    objects: tuple[StoredObject, ...]
    tensors: tuple[TensorEntry, ...]
    store: StoreIdentity = UNKNOWN_STORE


def read_index(source: Source) -> CheckpointIndex:
    """Read the index of the model folder that `source` is.

    Raises `InvalidCheckpoint` where a file is missing, damaged or cut off, `UnsupportedModel`
    where there are no safetensors, and what reading from a `Source` raises.
    """
    stored = {found.key: found for found in source.list()}
    if CONFIG not in stored:
        raise InvalidCheckpoint(f"{source.uri} has no {CONFIG}: is it a Hugging Face model folder?")
    config = _read_json(source, stored[CONFIG])
    shard_map = _read_shard_map(source, stored)
    shards = sorted(set(shard_map.values())) if shard_map else [_SINGLE]
    missing = [key for key in shards if key not in stored]
    if missing:
        raise InvalidCheckpoint(f"{_SHARD_MAP} names {missing[0]}, which {source.uri} has not")
    objects = tuple(stored[key] for key in shards)
    tensors = _read_tensors(source, objects)
    _check_shard_map(shard_map, tensors)
    return CheckpointIndex(
        source_uri=source.uri,
        config=config,
        files=tuple(stored[key] for key in SMALL_FILES if key in stored),
        objects=objects,
        tensors=tensors,
        store=source.store,
    )


def _read_json(source: Source, stored: StoredObject) -> dict[str, Any]:
    if stored.size_bytes > _MAX_JSON_BYTES:
        raise InvalidCheckpoint(
            f"{stored.key} has {stored.size_bytes} bytes, {_MAX_JSON_BYTES} at most are allowed"
        )
    try:
        fields = json.loads(read_range(source, stored))
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{stored.key} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidCheckpoint(f"{stored.key} is not a JSON object")
    return fields


def _read_shard_map(source: Source, stored: Mapping[str, StoredObject]) -> dict[str, str]:
    """Return tensor name to file name; empty where one file holds all tensors."""
    # A folder may have both forms; transformers prefers the single file.
    if _SINGLE in stored:
        return {}
    if _SHARD_MAP not in stored:
        raise UnsupportedModel(
            f"{source.uri} has neither {_SINGLE} nor {_SHARD_MAP}: convert it to safetensors"
        )
    weight_map = _read_json(source, stored[_SHARD_MAP]).get("weight_map")
    match weight_map:
        case dict() if weight_map and all(map(_is_file_name, weight_map.values())):
            return weight_map
    raise InvalidCheckpoint(f"{_SHARD_MAP} has no weight_map of file names")


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and is_text(value)


def _read_tensors(source: Source, objects: tuple[StoredObject, ...]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    with ThreadPoolExecutor(min(len(objects), _CONCURRENT_READS)) as pool:
        for entries in pool.map(lambda stored: _read_header(source, stored), objects):
            for entry in entries:
                if (other := tensors.setdefault(entry.name, entry)) is not entry:
                    raise InvalidCheckpoint(
                        f"tensor {entry.name} is both in {other.object_key} and {entry.object_key}"
                    )
    return tensors


def _read_header(source: Source, stored: StoredObject) -> tuple[TensorEntry, ...]:
    head = read_range(source, stored, 0, min(_FIRST_READ_BYTES, stored.size_bytes))
    end = header_end(stored, head)
    if end > len(head):
        head += read_range(source, stored, len(head), end)
    return parse_header(stored, head[LENGTH_BYTES:end])


def _check_shard_map(shard_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, key in shard_map.items():
        if name not in tensors or tensors[name].object_key != key:
            raise InvalidCheckpoint(f"{_SHARD_MAP} names tensor {name} in {key}, it is not there")
