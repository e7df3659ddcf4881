"""Reads a checkpoint at deploy in a process of its own, with limits of time and memory.

Headers and configuration are a stranger's JSON. Parsing it holds the interpreter's lock, and can
take twenty times the memory of the text; both would be the scheduler's and its gateway's. So a
child parses, checks and leaves out what is not needed; what it prints is small. A source that
sends a byte now and then ends with the child, too.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from paraserve_backend import errors
from paraserve_backend.errors import InvalidCheckpoint, ParaServeError, SourceUnavailable
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.model import read_model
from paraserve_backend.weights.checkpoint.token_lengths import read_longest_token
from paraserve_backend.weights.sources.base import Source
from paraserve_backend.weights.sources.open import Sources

#: The child's exit status where its output is the index, and where it is a `_Failure`.
_READ, _FAILED = 0, 3
#: The last is the kernel's, too, where memory runs out.
_OUT_OF_TIME = (signal.SIGXCPU, signal.SIGKILL)
_LATER_S = 10
_MODULE = "paraserve_backend.weights.checkpoint.child"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """What one checkpoint may cost to read: of a hundred shards of a large model a tenth of it."""

    memory_bytes: int = 2 << 30
    cpu_s: int = 60
    wall_s: int = 120


class _Order(msgspec.Struct, frozen=True, kw_only=True):
    uri: str
    endpoint_url: str | None
    region: str | None
    #: Paths; where there are any, folders are read in them only.
    roots: tuple[str, ...]
    limits: ReadLimits


class ReadCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment needs to know of its checkpoint."""

    index: CheckpointIndex
    #: `token_lengths.longest_token_bytes` of its tokenizer; 0: not known.
    longest_token_bytes: int


class _Output(msgspec.Struct, frozen=True, kw_only=True):
    index: msgspec.Raw
    longest_token_bytes: int


class _Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error by the name of its class."""

    kind: str
    message: str


def read_apart(
    uri: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    roots: Sequence[Path] = (),
    limits: ReadLimits | None = None,
) -> ReadCheckpoint:
    """Read and check the model folder at `uri` in a child process; blocks until it is through.

    Raises:
        InvalidCheckpoint: also where it takes more memory or time to read than `limits` allow.
        SourceUnavailable: also where the source takes longer than `limits` allow.
        ParaServeError: whatever `Sources.open` and `read_model` raise.
    """
    order = _Order(
        uri=uri,
        endpoint_url=endpoint_url,
        region=region,
        roots=tuple(map(str, roots)),
        limits=limits or ReadLimits(),
    )
    try:
        done = subprocess.run(
            # -P: what lies in the working directory is no module.
            [sys.executable, "-P", "-m", _MODULE],
            input=msgspec.json.encode(order),
            stdout=subprocess.PIPE,
            # Otherwise every thread that reads a shard has 64 MiB of addresses to itself.
            env={**os.environ, "MALLOC_ARENA_MAX": "2"},
            timeout=order.limits.wall_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(
            f"{uri} could not be read within {order.limits.wall_s} s: try again, or copy the "
            "model to a faster store."
        ) from None
    if done.returncode == _READ:
        output = msgspec.json.decode(done.stdout, type=_Output)
        return ReadCheckpoint(
            index=CheckpointIndex.from_json(bytes(output.index)),
            longest_token_bytes=output.longest_token_bytes,
        )
    if done.returncode == _FAILED:
        raise _error(msgspec.convert(json.loads(done.stdout), _Failure))
    if -done.returncode in _OUT_OF_TIME:
        raise InvalidCheckpoint(
            f"{uri} takes more than {order.limits.cpu_s} s of computing, or more memory than there "
            "is, to read: are its config.json and its headers what they should be?"
        )
    raise RuntimeError(f"reading {uri} ended with status {done.returncode}")


def _error(failure: _Failure) -> ParaServeError:
    error = getattr(errors, failure.kind)(failure.message)
    assert isinstance(error, ParaServeError)
    return error


def main() -> NoReturn:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
    _limit(order.limits)
    try:
        sources = Sources(roots=[Path(root) for root in order.roots])
        source = sources.open(order.uri, endpoint_url=order.endpoint_url, region=order.region)
        output, status = _read(source), _READ
    except ParaServeError as error:
        output, status = _failure(type(error), str(error)), _FAILED
    except MemoryError:
        sentence = (
            f"{order.uri} takes more than {order.limits.memory_bytes >> 20} MiB of memory to read: "
            "are its config.json and its headers what they should be?"
        )
        output, status = _failure(InvalidCheckpoint, sentence), _FAILED
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()
    sys.exit(status)


def _read(source: Source) -> bytes:
    index = read_model(source)
    return msgspec.json.encode(
        _Output(
            index=msgspec.Raw(index.to_json()),
            longest_token_bytes=read_longest_token(source, index.files),
        )
    )


def _failure(kind: type[ParaServeError], message: str) -> bytes:
    # A name in the sentence may have half of a surrogate pair, which msgspec cannot write.
    return json.dumps({"kind": kind.__name__, "message": message}).encode()


def _limit(limits: ReadLimits) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_s, limits.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Later than the parent, for a child whose parent was killed.
    signal.alarm(limits.wall_s + _LATER_S)


if __name__ == "__main__":
    main()
