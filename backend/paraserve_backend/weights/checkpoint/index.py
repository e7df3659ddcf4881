"""The index of a Hugging Face model folder: its configuration, and the bytes of each tensor.

It is read from headers and configuration, never from weights, and is stored when a model is
deployed, so that a cold start reads no header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel
from paraserve_backend.weights.checkpoint.safetensors import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    TensorEntry,
    header_end,
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
#: Files that a replica needs whole besides the weights, where they are there, and the bytes they
#: may have. The largest published ones have a third of it; each is read into memory as a whole.
SMALL_FILES: Mapping[str, int] = {
    CONFIG: 1_000_000,
    "generation_config.json": 1_000_000,
    "tokenizer.json": 100_000_000,
    "tokenizer_config.json": 10_000_000,
    "chat_template.jinja": 1_000_000,
}
#: JSON objects of which a replica reads fields.
_SETTINGS = (CONFIG, "generation_config.json", "tokenizer_config.json")
_SINGLE = "model.safetensors"
_SHARD_MAP = "model.safetensors.index.json"
#: First read of a file: one request is enough for nearly every header.
_FIRST_READ_BYTES = 256 << 10
#: The longest real shard maps have a tenth of it.
_MAX_SHARD_MAP_BYTES = 100_000_000
#: The headers of one checkpoint together: the format's own limit for one file.
_MAX_HEADERS_BYTES = MAX_HEADER_BYTES
_CONCURRENT_READS = 16
#: A file that git-lfs has not fetched is a few such lines.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_POINTER_BYTES = 1024
_FLOATING = ("F16", "BF16", "F32", "F64")
_ADAPTER, _GGUF = "adapter_config.json", ".gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """One model folder in one version.

    `files` are the small files that exist, `objects` those that hold `tensors`. `config` is
    config.json as parsed. `dtype` is the type of the first tensor of floating numbers, as
    safetensors spells it: it counts where config.json names none. It is empty without one.
    """

    source_uri: str
    config: Mapping[str, Any]
    files: tuple[StoredObject, ...]
    objects: tuple[StoredObject, ...]
    tensors: Mapping[str, TensorEntry]
    dtype: str = ""
    #: Tensors that the shard map puts into files that are not there. Not stored.
    missing: Mapping[str, str] = field(default_factory=dict)
    #: Where the source was read, and as whom. An index of an earlier version does not say: until
    #: the model is deployed again, the scheduler finds none of its weights on any node.
    store: StoreIdentity = UNKNOWN_STORE

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the small files, which every stage has."""
        return sum(stored.size_bytes for stored in self.files)

    def to_json(self) -> bytes:
        record = _StoredIndex(
            source_uri=self.source_uri,
            config=self.config,
            files=self.files,
            objects=self.objects,
            tensors=tuple(self.tensors.values()),
            dtype=self.dtype,
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
            dtype=record.dtype,
            store=record.store,
        )


class _StoredIndex(msgspec.Struct, frozen=True, kw_only=True):
    """A `CheckpointIndex` as JSON has it: its tensors are a list."""

    source_uri: str
    config: Mapping[str, Any]
    files: tuple[StoredObject, ...]
    objects: tuple[StoredObject, ...]
    tensors: tuple[TensorEntry, ...]
    dtype: str = ""
    store: StoreIdentity = UNKNOWN_STORE


def read_index(source: Source) -> CheckpointIndex:
    """Read the index of the model folder that `source` is.

    What the shard map says of tensors that are not there is no fault here: perhaps nobody needs
    them. Raises `InvalidCheckpoint` where a file is absent, damaged, cut off or too large,
    `UnsupportedModel` where there are no safetensors, and what reading from a `Source` raises.
    """
    stored = {found.key: found for found in source.list()}
    _check_kind(source, stored)
    files = tuple(stored[key] for key in SMALL_FILES if key in stored)
    config = _read_small_files(source, files)[CONFIG]
    shard_map = _read_shard_map(source, stored)
    shards = sorted(set(shard_map.values())) if shard_map else [_SINGLE]
    objects = tuple(stored[key] for key in shards if key in stored)
    if not objects:
        raise InvalidCheckpoint(f"{_SHARD_MAP} names {shards[0]}, which {source.uri} has not")
    headers = _read_headers(source, objects)
    return CheckpointIndex(
        source_uri=source.uri,
        config=config,
        files=files,
        objects=objects,
        tensors=_merge(headers, shard_map),
        dtype=_first_dtype(headers[0]),
        missing={name: key for name, key in shard_map.items() if key not in stored},
        store=source.store,
    )


def _check_kind(source: Source, stored: Mapping[str, StoredObject]) -> None:
    """Say what else the folder may be."""
    has_weights = _SINGLE in stored or _SHARD_MAP in stored
    if CONFIG in stored and has_weights:
        return
    if _ADAPTER in stored:
        raise UnsupportedModel(
            f"{source.uri} is a PEFT adapter without its base model: merge it into the base model "
            "(merge_and_unload) and deploy what save_pretrained writes of that"
        )
    if any(key.endswith(_GGUF) for key in stored) and not has_weights:
        raise UnsupportedModel(
            f"{source.uri} has its weights as GGUF, which is not supported: deploy the "
            "safetensors that the GGUF file was made from"
        )
    if CONFIG not in stored:
        raise InvalidCheckpoint(f"{source.uri} has no {CONFIG}: is it a Hugging Face model folder?")
    raise UnsupportedModel(
        f"{source.uri} has neither {_SINGLE} nor {_SHARD_MAP}: convert it to safetensors"
    )


def _read_small_files(source: Source, files: Iterable[StoredObject]) -> dict[str, dict[str, Any]]:
    """Check the small files, and return those that are settings."""
    settings = {}
    for stored in files:
        _check_size(stored, SMALL_FILES[stored.key])
        if stored.key in _SETTINGS:
            settings[stored.key] = _read_json(source, stored)
        elif stored.size_bytes <= _LFS_POINTER_BYTES:
            _check_fetched(stored, read_range(source, stored))
    return settings


def _check_size(stored: StoredObject, most_bytes: int) -> None:
    if stored.size_bytes > most_bytes:
        raise InvalidCheckpoint(
            f"{stored.key} has {stored.size_bytes} bytes, {most_bytes} at most are allowed"
        )


def _check_fetched(stored: StoredObject, head: bytes) -> None:
    if head.startswith(_LFS_POINTER):
        raise InvalidCheckpoint(
            f"{stored.key} is only a git-lfs pointer to the file: run `git lfs pull` and upload "
            "the folder again"
        )


def _read_json(source: Source, stored: StoredObject) -> dict[str, Any]:
    content = read_range(source, stored)
    _check_fetched(stored, content)
    try:
        fields = json.loads(content)
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
    _check_size(stored[_SHARD_MAP], _MAX_SHARD_MAP_BYTES)
    weight_map = _read_json(source, stored[_SHARD_MAP]).get("weight_map")
    entries = weight_map.items() if isinstance(weight_map, dict) else ()
    files = {name: key for name, key in entries if isinstance(key, str)}
    if not files:
        raise InvalidCheckpoint(f"{_SHARD_MAP} has no weight_map of file names")
    return files


def _read_headers(
    source: Source, objects: tuple[StoredObject, ...]
) -> list[tuple[TensorEntry, ...]]:
    """Return the tensors of each object."""
    with ThreadPoolExecutor(min(len(objects), _CONCURRENT_READS)) as pool:
        heads = list(pool.map(lambda stored: _read_head(source, stored), objects))
        ends = [header_end(stored, head) for stored, head in zip(objects, heads, strict=True)]
        if sum(ends) > _MAX_HEADERS_BYTES:
            raise InvalidCheckpoint(
                f"the headers of {source.uri} have {sum(ends)} bytes, {_MAX_HEADERS_BYTES} at most "
                "are allowed"
            )
        rests = pool.map(
            lambda stored, head, end: read_range(source, stored, len(head), max(end, len(head))),
            objects,
            heads,
            ends,
        )
    return [
        parse_header(stored, (head + rest)[LENGTH_BYTES:end])
        for stored, head, rest, end in zip(objects, heads, rests, ends, strict=True)
    ]


def _read_head(source: Source, stored: StoredObject) -> bytes:
    head = read_range(source, stored, 0, min(_FIRST_READ_BYTES, stored.size_bytes))
    _check_fetched(stored, head)
    return head


def _merge(
    headers: Sequence[Sequence[TensorEntry]], shard_map: Mapping[str, str]
) -> dict[str, TensorEntry]:
    """All tensors; of one that is in several files that which the shard map names, or the last."""
    tensors: dict[str, TensorEntry] = {}
    for entry in (entry for entries in headers for entry in entries):
        other = tensors.get(entry.name)
        if other is None or shard_map.get(entry.name) != other.object_key:
            tensors[entry.name] = entry
    return tensors


def _first_dtype(entries: Iterable[TensorEntry]) -> str:
    """As transformers finds it: by name, not by place."""
    floating = {entry.name: entry.dtype for entry in entries if entry.dtype in _FLOATING}
    return floating[min(floating)] if floating else ""
