"""The process that reads the large requests of one gateway: its loop, its limits and its frames.

`python -m paraserve_scheduler.gateway.large_request_worker MAX_BYTES TIMEOUT_S` takes one request
after the other from its standard input and writes what was read to its standard output. Each is
read in a fork, which is limited in time and memory: whatever a request does there, the next one
finds all as it was. The process ends with its input, so it does not outlive its gateway.
"""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import struct
import sys
from typing import BinaryIO

from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_scheduler.gateway.admission import CheckedRequest, ClientRequest
from paraserve_scheduler.gateway.kserve.errors import TooCostly, TooLarge
from paraserve_scheduler.gateway.kserve.json_codec import BinaryOutputs
from paraserve_scheduler.gateway.kserve.message_tensors import make_raw
from paraserve_scheduler.gateway.reading import UnreadRequest, read

#: Leads every frame: how many bytes it has.
FRAME_LENGTH = struct.Struct("<Q")
#: Of addresses, those of Python and its modules among them.
_MEMORY_BYTES = 768 << 20
#: Measured: the worst body takes 50 times its size, a message 40 times.
_MEMORY_PER_BYTE = 128
#: A gateway's streams come first on a machine that has too few cores.
_NICENESS = 5

#: A read request as it travels; its message is serialized.
Reading = tuple[bytes, CheckedRequest | InvalidRequest, BinaryOutputs]


def main() -> None:
    max_request_bytes, timeout_s = int(sys.argv[1]), float(sys.argv[2])
    os.nice(_NICENESS)
    gc.freeze()  # so that forks share what is imported
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _write(answers, b"")  # all is imported
    while (frame := _read(requests)) is not None:
        _write(answers, _in_fork(frame, max_request_bytes, timeout_s))


def too_costly(what: str) -> TooCostly:
    return TooCostly(f"Reading the request takes too much {what}; send less, or simpler JSON.")


def _in_fork(frame: bytes, max_request_bytes: int, timeout_s: float) -> bytes:
    """Return the answer for a request, which a fork of this process makes."""
    out, into = os.pipe()
    fork = os.fork()
    if fork == 0:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)  # its end is the fork's
        limit_bytes = _MEMORY_BYTES + _MEMORY_PER_BYTE * max_request_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
        with open(into, "wb") as pipe:
            pipe.write(_answer(frame, max_request_bytes))
        os._exit(0)
    os.close(into)
    with open(out, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(fork, 0)
    if status == 0:
        return answer
    is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return pickle.dumps(too_costly("time" if is_late else "memory"))


def _answer(frame: bytes, max_request_bytes: int) -> bytes:
    request: UnreadRequest = pickle.loads(frame)
    answer: Reading | ParaServeError
    try:
        answer = _packed(read(request.unpacked(max_request_bytes)), max_request_bytes)
    except ParaServeError as error:
        answer = error
    except MemoryError:
        answer = too_costly("memory")
    return pickle.dumps(answer)


def _packed(request: ClientRequest, max_request_bytes: int) -> Reading:
    message = request.message
    if isinstance(request.checked, CheckedRequest):
        make_raw(message)
        if message.ByteSize() > max_request_bytes:
            raise TooLarge.than(max_request_bytes)
    return message.SerializeToString(), request.checked, request.binary


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
