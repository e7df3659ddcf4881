"""The standalone template in a real tritonserver, without scheduler, agent or gateway."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

from integration.support.limits import HANG_S
from integration.support.single_models import fetched_by, load, unload
from integration.support.triton_server import TritonServer
from paraserve_backend.tritonserver.host.stubs import ProcessTable
from tests.support.models import write_model, write_words

TEMPLATE = Path(__file__).parents[2] / "model_repository_templates" / "standalone.pbtxt"


def generate(server: TritonServer, text: str, max_tokens: int) -> list[int]:
    """Ask over Triton's own HTTP endpoint and return the ids of the answer."""
    body = json.dumps({"text_input": text, "max_tokens": max_tokens}).encode()
    url = f"http://{server.http_address}/v2/models/whole/generate"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=HANG_S) as response:
        ids: list[int] = json.loads(response.read())["output_ids"]
    return ids


def test_any_triton_serves_a_whole_model_with_the_template_alone(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    model = write_model(checkpoint, "qwen3", seed=4)
    write_words(checkpoint)
    with TritonServer(tmp_path / "triton") as server:
        folder = server.model_repository / "whole"
        (folder / "1").mkdir(parents=True)
        config = TEMPLATE.read_text().replace("/models/llama", str(checkpoint))
        (folder / "config.pbtxt").write_text(config)
        load(server, "whole")
        assert generate(server, "w5 w6 w7", 12) == model.greedy([5, 6, 7], 12)
        (stub,) = ProcessTable(server.model_repository).find()
        assert fetched_by(stub)  # what is asserted after the unload would find it
        unload(server)
