"""Our generate loop in a real Triton; its tiny model's passes take as long as a large one's."""

from __future__ import annotations

from pathlib import Path

from integration.support.checkpoints import LlamaShape, write_raw_bf16
from integration.support.single_models import add_model, load
from integration.support.triton_server import TritonServer

BACKEND = "paraserve_paced"
#: Requests that a replica runs at once.
PLACES = 8
CONTEXT = 4096
_SHAPE = LlamaShape(layers=1, hidden=64, intermediate=64, heads=2, kv_heads=1, max_context=CONTEXT)
#: The backend with one change: a pass ends no sooner than it should. Which pace a model has, the
#: name of its deployment says.
_CODE = """
import time

import torch

from paraserve_backend.roles import generate
from paraserve_backend.tritonserver.stub.model import TritonPythonModel as _Model

PASS_S = 0.0


class _Paced(generate.LocalForward):
    def _step(self, batch):
        ends_s = time.monotonic() + PASS_S
        result = super()._step(batch)
        time.sleep(max(0.0, ends_s - time.monotonic()))
        return result


generate.LocalForward = _Paced


class TritonPythonModel(_Model):
    def initialize(self, args):
        global PASS_S
        torch.set_num_threads(1)
        PASS_S = float(args["model_name"].split(".")[0].rpartition("-")[2]) / 1e3
        super().initialize(args)
"""


def deployment(pass_ms: int) -> str:
    """Return the name of the deployment whose passes take so long."""
    return f"paced-{pass_ms}"


def load_paced(server: TritonServer, folder: Path, *pass_ms: int) -> None:
    """Load a replica of each pace, number 1 of its deployment."""
    checkpoint = folder / "checkpoint"
    write_raw_bf16(checkpoint, _SHAPE, shard_bytes=1 << 30)
    server.add_backend(BACKEND, _CODE)
    for each in pass_ms:
        name = f"{deployment(each)}.1"
        add_model(server, name, BACKEND, checkpoint, {"max_sequences": str(PLACES)})
        load(server, name)
