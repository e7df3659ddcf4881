"""vLLM itself as a Triton model on a CPU. Opt-in: `make test-vllm`.

The server is that of the other tests, but its models use the packages of vLLM's environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.support.single_models import (
    FRESH,
    MAX_TOKENS,
    Asked,
    add_model,
    kill,
    load,
    unload,
)
from integration.support.tiny_cluster import prompts, wait_until
from integration.support.triton_server import TritonServer
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken
from paraserve_backend.tritonserver.host.stubs import ProcessTable
from tests.support.models import TinyModel, write_model, write_words

ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-vllm"

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / "ready").exists(), reason="there is no vLLM here: make test-vllm"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("checkpoint")
    # vLLM's attention on a CPU takes heads of 32, 64, ... only.
    model = write_model(folder, "llama", seed=4, head_dim=32)
    write_words(folder)
    return model


@pytest.fixture
def server(tmp_path: Path, model: TinyModel) -> Iterator[TritonServer]:
    with TritonServer(tmp_path, python=ENVIRONMENT / "bin" / "python") as server:
        add_model(server, "v", "paraserve", model.folder, {"engine": "vllm"})
        load(server, "v")
        yield server
        unload(server)
        # A process that crashes while it ends has said so.
        assert "egfault" not in server.log


def processes_below(pid: int) -> list[int]:
    """Return the living processes that `pid` has started, at any depth."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except FileNotFoundError:
        return []
    return [each for child in children for each in (child, *processes_below(child))]


def is_alive(pid: int) -> bool:
    """Whether a process is there and no mere entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


def test_a_model_with_engine_vllm_answers_and_takes_over(
    server: TritonServer, model: TinyModel
) -> None:
    (stub,) = ProcessTable(server.model_repository).find()
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_below(stub.pid)]
    assert any(b"EngineCore" in name for name in names)
    prompt = prompts(3)[2]
    expected = model.greedy(prompt, MAX_TOKENS)
    assert Asked(server, "v", prompt, FRESH).rest()[0] == expected
    begun = tuple(ChosenToken(token_id=i, logprob=0.0, ranking=None) for i in expected[:50])
    resume = Resume(seed=7, max_tokens=MAX_TOKENS, tokens=begun)
    assert Asked(server, "v", prompt, resume).rest()[0] == expected[50:]


def test_nothing_of_vllm_outlives_the_models_process(server: TritonServer) -> None:
    (stub,) = ProcessTable(server.model_repository).find()
    processes = processes_below(stub.pid)
    assert len(processes) > 1
    kill(server)
    wait_until(lambda: not any(map(is_alive, processes)))
