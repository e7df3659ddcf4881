"""Four tritonservers with two pipelines of near-empty stages: bench_hop's world.

Models on node 0, the head, as clients call them by BLS: `ours` is the product's ensemble of stage 0
and its real link role, which the activation channel joins to a stage on each other node; `chain0`
is the same pipeline of ensembles whose link models call the next server by gRPC; `head` is stage 0
and a link that answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zmq
from tritonclient.grpc import InferenceServerClient, InferInput

from integration.support.limits import HANG_S
from integration.support.triton_server import TritonServer
from paraserve_backend.protocol.names import (
    FORWARD_BATCH,
    FORWARD_HIDDEN,
    FORWARD_RESULT,
    FORWARD_TOKEN_IDS,
    Role,
)
from tests.support.ports import free_ports

NODES = 4
OURS, CHAIN, HEAD = "ours", "chain0", "head"
#: Stages that a pass of each model goes through.
STAGES: Mapping[str, int] = {OURS: NODES, CHAIN: NODES, HEAD: 1}
ROW_BYTES = 8192
#: A file for Triton, which alone can import it.
_MODEL_PY = Path(__file__).with_name("model.py")

_BATCH = f'{{ name: "{FORWARD_BATCH}" data_type: TYPE_UINT8 dims: [-1] }}'
_TOKEN_IDS = f'{{ name: "{FORWARD_TOKEN_IDS}" data_type: TYPE_INT32 dims: [-1] }}'
_HIDDEN = f'{{ name: "{FORWARD_HIDDEN}" data_type: TYPE_UINT8 dims: [-1, {ROW_BYTES}] }}'
_RESULT = f'{{ name: "{FORWARD_RESULT}" data_type: TYPE_UINT8 dims: [-1] }}'
_DRIVER_INPUTS = (
    '{ name: "model" data_type: TYPE_STRING dims: [1] }',
    *(
        f'{{ name: "{name}" data_type: TYPE_INT32 dims: [1] }}'
        for name in ("tokens", "stages", "passes")
    ),
)
_SECONDS = '{ name: "seconds" data_type: TYPE_FP64 dims: [-1] }'


class Passes:
    """Times forward passes on the head."""

    def __init__(self, head: str) -> None:
        self._client = InferenceServerClient(head)

    def seconds(self, model: str, *, tokens: int, passes: int) -> npt.NDArray[np.float64]:
        """Return how long each of `passes` took; a row of hidden states per token."""
        name = InferInput("model", [1], "BYTES")
        name.set_data_from_numpy(np.array([model.encode()], np.object_))
        counts = {"tokens": tokens, "stages": STAGES[model], "passes": passes}
        inputs = [name, *(_int32(key, value) for key, value in counts.items())]
        measured = self._client.infer("driver", inputs).as_numpy("seconds")
        assert measured is not None
        return measured

    def close(self) -> None:
        self._client.close()


@contextmanager
def hop_chain(folder: Path) -> Iterator[Passes]:
    """Start the servers with all models; everything is gone after the body."""
    key_file = _write_keys(folder / "curve.key")
    ring = [f"tcp://127.0.0.1:{port}" for port in free_ports(NODES)]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(TritonServer(folder / f"node{node}")) for node in range(NODES)
        ]
        addresses = [server.grpc_address for server in servers]
        # From the last on: a model must be there before another calls it.
        for node, server in reversed(list(enumerate(servers))):
            models = _models(node, addresses, _Ring(addresses=ring, key_file=key_file))
            _load(server, models)
        passes = Passes(addresses[0])
        stack.callback(passes.close)
        yield passes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ring:
    """Where the members of the activation channel listen: the link, then the stages."""

    addresses: Sequence[str]
    key_file: Path

    def place(self, node: int) -> dict[str, str]:
        return {
            "listen": self.addresses[node],
            "next": self.addresses[(node + 1) % NODES],
            "key_file": str(self.key_file),
        }


def _models(node: int, addresses: Sequence[str], ring: _Ring) -> dict[str, str]:
    """Return the config of every model of a node by name, in the order to load them."""
    is_last = node == NODES - 1
    first = _TOKEN_IDS if node == 0 else _HIDDEN
    last = _RESULT if is_last else _HIDDEN
    stage = {"row_bytes": str(ROW_BYTES), "is_last": str(is_last).lower()}
    models = {f"stage{node}": _python([_BATCH, first], last, stage | {"part": "stage"})}
    if is_last:
        models[f"chain{node}"] = models.pop(f"stage{node}")
    else:
        call = {"part": "call", "server": addresses[node + 1], "model": f"chain{node + 1}"}
        models[f"call{node}"] = _python([_BATCH, _HIDDEN], _RESULT, call)
        models[f"chain{node}"] = _ensemble(first, f"stage{node}", f"call{node}")
    if node == 0:
        return models | _head_models(ring)
    relay = stage | ring.place(node) | {"part": "relay"}
    return models | {f"relay{node}": _python([_BATCH, _HIDDEN], last, relay)}


def _head_models(ring: _Ring) -> dict[str, str]:
    link = ring.place(0) | {
        "role": Role.LINK,
        "replica": OURS,
        "forward_timeout_s": f"{HANG_S:g}",
    }
    return {
        "link": _config("paraserve", [_BATCH, _HIDDEN], _RESULT, link),
        OURS: _ensemble(_TOKEN_IDS, "stage0", "link"),
        "echo": _python([_BATCH, _HIDDEN], _RESULT, {"part": "echo"}),
        HEAD: _ensemble(_TOKEN_IDS, "stage0", "echo"),
        "driver": _python(_DRIVER_INPUTS, _SECONDS, {"part": "driver"}),
    }


def _load(server: TritonServer, models: Mapping[str, str]) -> None:
    client = InferenceServerClient(server.grpc_address)
    for name, config in models.items():
        folder = server.model_repository / name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
        if 'backend: "python"' in config:
            source = _MODEL_PY.read_text(encoding="utf-8")
            (folder / "1" / "model.py").write_text(source, encoding="utf-8")
        client.load_model(name)
    client.close()


def _python(inputs: Sequence[str], output: str, parameters: Mapping[str, str]) -> str:
    return _config("python", inputs, output, parameters)


def _config(backend: str, inputs: Sequence[str], output: str, parameters: Mapping[str, str]) -> str:
    rows = "\n".join(
        f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'
        for name, value in parameters.items()
    )
    return (
        f'backend: "{backend}"\nmax_batch_size: 0\n'
        f"input [{', '.join(inputs)}]\noutput [{output}]\n"
        f"instance_group [{{ count: 1 kind: KIND_CPU }}]\n{rows}\n"
    )


def _ensemble(first: str, stage: str, link: str) -> str:
    source = FORWARD_TOKEN_IDS if first == _TOKEN_IDS else FORWARD_HIDDEN
    # On the way in `hidden` is the input's name, so the stage's output needs another.
    steps = (
        (stage, {FORWARD_BATCH: FORWARD_BATCH, source: source}, {FORWARD_HIDDEN: "after"}),
        (
            link,
            {FORWARD_BATCH: FORWARD_BATCH, FORWARD_HIDDEN: "after"},
            {FORWARD_RESULT: FORWARD_RESULT},
        ),
    )
    rows = ", ".join(
        f'{{ model_name: "{model}" model_version: -1 '
        f"{_tensor_map('input_map', taken)} {_tensor_map('output_map', given)} }}"
        for model, taken, given in steps
    )
    return (
        f'platform: "ensemble"\nmax_batch_size: 0\ninput [{_BATCH}, {first}]\n'
        f"output [{_RESULT}]\nensemble_scheduling {{ step [{rows}] }}\n"
    )


def _tensor_map(kind: str, names: Mapping[str, str]) -> str:
    return " ".join(f'{kind} {{ key: "{key}" value: "{value}" }}' for key, value in names.items())


def _int32(name: str, value: int) -> InferInput:
    given = InferInput(name, [1], "INT32")
    given.set_data_from_numpy(np.array([value], np.int32))
    return given


def _write_keys(path: Path) -> Path:
    public, secret = zmq.curve_keypair()
    path.touch(mode=0o600)
    path.write_bytes(public + b"\n" + secret + b"\n")
    return path
