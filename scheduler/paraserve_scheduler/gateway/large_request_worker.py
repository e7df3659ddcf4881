"""The process that reads the large requests of one gateway: its loop, its limits and its frames.

`python -m paraserve_scheduler.gateway.large_request_worker MAX_BYTES` reads one request after the
other from its standard input and writes what it has read to its standard output. It ends with its
input, so it never outlives its gateway, and by its limit of memory, which costs one request.
"""

from __future__ import annotations

import os
import pickle
import resource
import struct
import sys
from pathlib import Path
from typing import BinaryIO

from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_scheduler.gateway.admission import CheckedRequest, ClientRequest
from paraserve_scheduler.gateway.kserve.errors import TooCostly
from paraserve_scheduler.gateway.kserve.json_codec import BinaryOutputs
from paraserve_scheduler.gateway.reading import UnreadRequest, read

#: Leads every frame: how many bytes it has.
FRAME_LENGTH = struct.Struct("<Q")
#: Measured: the worst body takes 40 times its size, and a message 30 times.
_MEMORY_PER_BYTE = 96
_MEMORY_BYTES = 128 << 20
#: A gateway's streams come first on a machine that has too few cores.
_NICENESS = 5

#: A read request as it travels; its message is serialized.
Reading = tuple[bytes, CheckedRequest | InvalidRequest, BinaryOutputs]


def main() -> None:
    max_request_bytes = int(sys.argv[1])
    os.nice(_NICENESS)
    _limit_memory(_MEMORY_BYTES + _MEMORY_PER_BYTE * max_request_bytes)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _write(answers, b"")  # all is imported
    while (frame := _read(requests)) is not None:
        _write(answers, pickle.dumps(_answer(frame, max_request_bytes)))


def _answer(frame: bytes, max_request_bytes: int) -> Reading | ParaServeError:
    request: UnreadRequest = pickle.loads(frame)
    try:
        client_request = read(request.unpacked(max_request_bytes))
    except ParaServeError as error:
        return error
    except MemoryError:
        return too_costly("memory")
    return _packed(client_request)


def too_costly(what: str) -> TooCostly:
    return TooCostly(f"Reading the request takes too much {what}; send less, or simpler JSON.")


def _packed(request: ClientRequest) -> Reading:
    return request.message.SerializeToString(), request.checked, request.binary


def _limit_memory(more_bytes: int) -> None:
    """Limit what this process may have of addresses besides what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def _read(requests: BinaryIO) -> bytes | None:
    """Return the next frame; `None` at the end of the input."""
    head = requests.read(FRAME_LENGTH.size)
    if len(head) < FRAME_LENGTH.size:
        return None
    return requests.read(*FRAME_LENGTH.unpack(head))


def _write(answers: BinaryIO, frame: bytes) -> None:
    answers.write(FRAME_LENGTH.pack(len(frame)))
    answers.write(frame)
    answers.flush()


if __name__ == "__main__":
    main()
