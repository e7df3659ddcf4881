"""Single models in real Tritons, asked and told what gateways and agents ask and tell them."""

from __future__ import annotations

import json
import queue
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from integration.support.limits import HANG_S
from integration.support.tiny_cluster import wait_until
from integration.support.triton_server import TritonServer
from paraserve_backend.protocol.names import COMMAND_PARAMETER, SECRET_PARAMETER
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME, Resume
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.protocol.tensors import HAND_OVER_OUTPUTS
from paraserve_backend.tritonserver.host.stubs import ProcessTable, Stub
from paraserve_scheduler.local.layout import SHM

_REPOSITORY = Path(__file__).resolve().parents[2]
_TEMPLATE = _REPOSITORY / "model_repository_templates" / "standalone.pbtxt"
#: Long enough that a request is still running when it is told to move.
MAX_TOKENS = 400
#: Of a request that has no token yet, but may move.
FRESH = Resume(seed=7, max_tokens=MAX_TOKENS, tokens=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One response of a model."""

    token_ids: list[int]
    is_last: bool
    #: Where to go on, and how, if the request moves.
    moved: tuple[str, Resume] | None


class Asked:
    """One streamed request to one model."""

    def __init__(
        self,
        server: TritonServer,
        model: str,
        prompt: Sequence[int],
        resume: Resume,
        **settings: int,
    ) -> None:
        self._got: queue.SimpleQueue[tuple[triton.InferResult | None, Exception | None]]
        self._got = queue.SimpleQueue()
        self._client = triton.InferenceServerClient(server.grpc_address)
        self._client.start_stream(lambda result, error: self._got.put((result, error)))
        ids = triton.InferInput("input_ids", [len(prompt)], "INT32")
        ids.set_data_from_numpy(np.array(prompt, np.int32))
        stream = triton.InferInput("stream", [1], "BOOL")
        stream.set_data_from_numpy(np.array([True]))
        parameters: dict[str, str | int | bool] = {
            "max_tokens": MAX_TOKENS,
            RESUME: resume.encode(),
            **settings,
        }
        self._client.async_stream_infer(model, [ids, stream], parameters=parameters)

    def next(self) -> Part:
        result, error = self._got.get(timeout=HANG_S)
        if error is not None:
            raise error
        assert result is not None
        target = result.as_numpy(HAND_OVER_TO)
        if target is not None:
            resume = result.as_numpy(RESUME)
            assert resume is not None
            moved = (target[0].decode(), Resume.decode(resume[0].decode()))
            return Part(token_ids=[], is_last=True, moved=moved)
        ids = result.as_numpy("output_ids")
        assert ids is not None
        is_last = result.as_numpy("finish_reason") is not None
        return Part(token_ids=ids.tolist(), is_last=is_last, moved=None)

    def take(self, count: int) -> list[int]:
        return [token for _ in range(count) for token in self.next().token_ids]

    def rest(self) -> tuple[list[int], Part]:
        """Return the tokens until the end, and the last response."""
        ids: list[int] = []
        while True:
            part = self.next()
            ids += part.token_ids
            if part.is_last:
                self.close()
                return ids, part

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


def run_dir(server: TritonServer) -> RunDir:
    """Return where the agent of this server's models would leave its files."""
    return RunDir(server.model_repository.parent / "run")


def tell(server: TritonServer, model: str, parameters: Mapping[str, str | int | bool]) -> None:
    """Send a model a request without tensors; raises what it is answered if that is an error."""
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    client = triton.InferenceServerClient(server.grpc_address)
    client.start_stream(lambda result, error: answers.put(error))
    client.async_stream_infer(
        model, [], parameters=dict(parameters), enable_empty_final_response=True
    )
    error = answers.get(timeout=HANG_S)
    client.stop_stream()
    client.close()
    if error is not None:
        raise error


def hand_over(server: TritonServer, model: str, *targets: str) -> None:
    """Tell a model where its requests shall go, as the node's agent does.

    The targets have no address: they take no KV blocks.
    """
    command = {"hand_over": [{"replica": target, "address": ""} for target in targets]}
    secret = run_dir(server).secret_file(model).read_text()
    tell(server, model, {COMMAND_PARAMETER: json.dumps(command), SECRET_PARAMETER: secret})


def add_model(
    server: TritonServer, name: str, backend: str, checkpoint: Path, parameters: dict[str, str]
) -> None:
    folder = server.model_repository / name
    (folder / "1").mkdir(parents=True)
    secret_file = run_dir(server).secret_file(name)
    secret_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret_file.write_text(secrets.token_hex(32))
    parameters = {"run_dir": str(run_dir(server).path), **parameters}
    config = _TEMPLATE.read_text().replace("/models/llama", str(checkpoint))
    config = config.replace('backend: "paraserve"', f'backend: "{backend}"')
    for output in HAND_OVER_OUTPUTS:
        config += f'\noutput {{ name: "{output.name}" data_type: TYPE_STRING dims: [ 1 ] }}'
    for key, value in parameters.items():
        config += f'\nparameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
    (folder / "config.pbtxt").write_text(config)


def kill(server: TritonServer) -> None:
    """Kill a server's one model process, and remove what it leaves, as the node's agent does."""
    processes = ProcessTable(server.model_repository)
    (stub,) = processes.find()
    processes.kill(stub)
    processes.remove_leftovers([stub])
    for folder in fetched_by(stub):
        shutil.rmtree(folder)


def fetched_by(stub: Stub) -> list[Path]:
    """Return the folders in which a standalone model keeps what it has fetched."""
    return list(SHM.glob(f"paraserve-standalone-{stub.pid}-*"))


def load(server: TritonServer, model: str) -> None:
    client = triton.InferenceServerClient(server.grpc_address)
    client.load_model(model)
    client.close()


def unload(server: TritonServer) -> None:
    """Unload what still runs, and see that nothing of it remains."""
    client = triton.InferenceServerClient(server.grpc_address)
    for stub in ProcessTable(server.model_repository).find():
        client.unload_model(stub.model)
        wait_until(lambda: not server.shm_regions())
        assert not fetched_by(stub)
    client.close()
