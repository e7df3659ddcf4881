"""vLLM itself behind the interface of engines, on a CPU. Opt-in: `make test-vllm`.

It has an environment of its own (docs/engines.md), which has no Triton that vLLM's NumPy goes with;
what runs here is all below that: adapter, role, weights in the tier, hand-over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.support.limits import HANG_S
from integration.support.vllm_role import (
    PROMPT,
    Gauges,
    Reply,
    config_of,
    request,
)
from paraserve_backend.engines.base import LoopState
from paraserve_backend.engines.signatures import VLLM, differences
from paraserve_backend.errors import Cancelled, InvalidRequest
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.hand_over import Target
from paraserve_backend.protocol.request import WantedOutputs
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken, Sampling, Steering
from paraserve_backend.roles.external import ExternalRole
from tests.support.models import TinyModel, write_model, write_words

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    role: ExternalRole
    model: TinyModel
    gauges: Gauges

    def ask(self, max_tokens: int, resume: Resume | None = None, **changes: Any) -> Reply:
        reply = Reply()
        self.role.add(request(max_tokens, **changes), reply, resume)
        return reply


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("checkpoint")
    # vLLM's attention on a CPU takes heads of 32, 64, ... only.
    model = write_model(folder, "llama", seed=4, head_dim=32)
    write_words(folder)
    return model


@pytest.fixture(scope="module")
def running(model: TinyModel) -> Iterator[Running]:
    gauges = Gauges()
    role = ExternalRole("vllm", config_of(model.folder), gauges)
    yield Running(role=role, model=model, gauges=gauges)
    role.close()
    assert not list(Path("/dev/shm").glob(f"paraserve-standalone-{os.getpid()}-*"))


def test_the_installed_vllm_is_the_one_we_call() -> None:
    assert differences(VLLM) == ()


def test_greedy_tokens_are_those_of_transformers(running: Running) -> None:
    assert running.ask(60).answer() == running.model.greedy(PROMPT, 60)


def test_requests_run_together(running: Running) -> None:
    prompts = [[number, 7, 9] for number in range(1, 9)]
    replies = [running.ask(20, input_ids=tuple(prompt)) for prompt in prompts]
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.answer() == running.model.greedy(prompt, 20)


def resume_after(tokens: Sequence[int], max_tokens: int) -> Resume:
    chosen = tuple(ChosenToken(token_id=each, logprob=-1.0, ranking=None) for each in tokens)
    return Resume(seed=3, max_tokens=max_tokens, tokens=chosen)


def test_an_answer_begun_elsewhere_goes_on_token_by_token(running: Running) -> None:
    expected = running.model.greedy(PROMPT, 40)
    reply = running.ask(40, resume_after(expected[:13], 40))
    assert reply.answer() == expected[13:]


def test_an_answer_is_handed_over_and_taken_back(running: Running) -> None:
    expected = running.model.greedy(PROMPT, 200)
    reply = running.ask(200, resume_after([], 200))
    got: list[int] = []
    for _ in range(5):
        said = reply.next()
        assert isinstance(said, Delta)
        got += said.token_ids
    running.role.hand_over((Target(replica="d.2", address=""),))
    while isinstance(said := reply.next(), Delta):
        got += said.token_ids
    assert isinstance(said, Resume)
    assert [token.token_id for token in said.tokens] == got
    running.role.hand_over(())
    assert got + running.ask(200, said).answer() == expected


def test_log_probabilities_are_the_models_own(running: Running) -> None:
    ranked = Sampling(seed=3, steering=Steering(num_logprobs=2, repetition_penalty=1.3))
    wanted = WantedOutputs(cumulative_logprob=True, logprobs=True)
    reply = running.ask(1, sampling=ranked, wanted=wanted)
    said = reply.next()
    assert isinstance(said, Delta)
    expected = running.model.logits(PROMPT)[0].log_softmax(-1)
    assert said.logprobs[0] == pytest.approx(float(expected[said.token_ids[0]]), abs=1e-4)
    assert said.cumulative_logprob == said.logprobs[0]
    best = [token for token in said.ranked[0] if token.rank <= 2]
    for token in best:
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-4)


def test_our_end_tokens_end_an_answer_and_not_before_the_shortest_one(running: Running) -> None:
    expected = running.model.greedy(PROMPT, 20)
    end_id = expected[5]
    first = expected.index(end_id)
    assert running.ask(20, stop_token_ids=(end_id,)).answer() == expected[: first + 1]
    longer = running.ask(20, stop_token_ids=(end_id,), min_tokens=first + 2).answer()
    assert len(longer) >= first + 2
    assert end_id not in longer[: first + 1]


def test_a_seed_decides_the_draws(running: Running) -> None:
    drawn = Sampling(temperature=1.5, seed=8)
    first, again = (running.ask(20, sampling=drawn).answer() for _ in range(2))
    other = running.ask(20, sampling=Sampling(temperature=1.5, seed=9)).answer()
    assert first == again != other


def test_a_cancelled_request_leaves_the_engine(running: Running) -> None:
    reply = running.ask(240)
    reply.next()
    reply.cancelled.set()
    while isinstance(said := reply.next(), Delta):
        pass
    assert isinstance(said, Cancelled)
    while (state := running.gauges.states.get(timeout=HANG_S)) != LoopState(requests_moved=1):
        assert state.running <= 1
    assert running.ask(3).answer() == running.model.greedy(PROMPT, 3)


def test_gauges_are_vllms_own(running: Running) -> None:
    reply = running.ask(250)
    while (state := running.gauges.states.get(timeout=HANG_S)).kv_blocks_used == 0:
        pass
    assert (state.running, state.waiting) == (1, 0)
    reply.answer()


def test_what_vllm_cannot_do_here_is_refused(running: Running) -> None:
    with pytest.raises(InvalidRequest, match="'bad_words' is not something the engine vllm"):
        running.ask(3, bad_words=("w1",))


DIES = """
import os, signal, sys, threading
from pathlib import Path
from integration.support.vllm_role import Gauges, Reply, config_of, engine_processes, request
from paraserve_backend.engines.base import EngineDead
from paraserve_backend.roles.external import ExternalRole

def main() -> None:
    # As `tritonserver.stub.model` does: a process without its engine must not stay.
    threading.excepthook = lambda args: os._exit(70 * (args.exc_type is EngineDead))
    role = ExternalRole("vllm", config_of(Path(sys.argv[1])), Gauges())
    reply = Reply()
    role.add(request(250), reply)
    reply.next()
    (engine,) = engine_processes(os.getpid())
    os.kill(engine if sys.argv[2] == "engine" else os.getpid(), signal.SIGKILL)
    threading.Event().wait()

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(("victim", "status"), [("engine", 70), ("role", -9)])
def test_role_and_engine_die_together(
    model: TinyModel, tmp_path: Path, victim: str, status: int
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    with subprocess.Popen(
        [sys.executable, str(script), str(model.folder), victim],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
    ) as process:
        # The output ends when the last process that has it open does: all of them must.
        process.communicate(timeout=HANG_S)
    assert process.returncode == status
    for folder in Path("/dev/shm").glob(f"paraserve-standalone-{process.pid}-*"):
        shutil.rmtree(folder)
