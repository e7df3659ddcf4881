"""Role `generate` with an engine that the test plays: text, ends, cancels, hand-over, death."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paraserve_backend.engines.base import (
    EngineDead,
    EngineRequest,
    EngineSettings,
    EngineStats,
    LoopState,
)
from paraserve_backend.engines.pass_clock import PassClock
from paraserve_backend.errors import (
    Cancelled,
    InvalidRequest,
    ParaServeError,
    ResourceExhausted,
    Unavailable,
)
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.engine_abilities import Abilities, Setting
from paraserve_backend.protocol.hand_over import Target
from paraserve_backend.protocol.parameters import GenerateConfig, KvConfig
from paraserve_backend.protocol.request import GenerateRequest, WantedOutputs
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken, Sampling, Steering
from paraserve_backend.roles.external import ExternalRole, visible_devices
from tests.support.engine_packages import write_engine_package
from tests.support.generate_config import make_generate_config, weights_from
from tests.support.limits import HANG_S
from tests.support.models import write_model, write_words

OTHER = Target(replica="d.2", address="")


class ScriptedEngine:
    """Yields what the test gives it; a request's script ends with an exception or `None`."""

    def __init__(self) -> None:
        self.abilities = Abilities(
            name="scripted",
            settings=frozenset({Setting.MIN_TOKENS, Setting.PRESENCE_PENALTY}),
            carried=frozenset({Setting.MIN_TOKENS}),
            environment={"SCRIPTED_ENGINE": "1"},
        )
        self.settings: EngineSettings | None = None
        self.submitted: queue.SimpleQueue[EngineRequest] = queue.SimpleQueue()
        self.closed: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.start_error: Exception | None = None
        self.is_stopped = False
        self._steps: asyncio.Queue[Sequence[int] | Exception | None] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self, settings: EngineSettings) -> None:
        self._loop = asyncio.get_running_loop()
        self.settings = settings
        if self.start_error is not None:
            raise self.start_error

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Sequence[ChosenToken], None]:
        self.submitted.put(request)
        try:
            while (step := await self._steps.get()) is not None:
                if isinstance(step, Exception):
                    raise step
                yield [ChosenToken(token_id=each, logprob=-0.5, ranking=None) for each in step]
        finally:
            self.closed.put(request.request_id)

    async def stats(self) -> EngineStats:
        return EngineStats(running=1, waiting=2, kv_used=0.5)

    async def stop(self) -> None:
        self.is_stopped = True

    def give(self, step: Sequence[int] | Exception | None) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._steps.put_nowait, step)


Said = Delta | ParaServeError | tuple[str, Resume]


@dataclass(eq=False)
class Reply:
    got: queue.SimpleQueue[Said] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, delta: Delta) -> None:
        self.got.put(delta)

    def fail(self, error: ParaServeError) -> None:
        self.got.put(error)

    def move(self, replica: str, resume: Resume) -> None:
        self.got.put((replica, resume))

    def is_cancelled(self) -> bool:
        return self.cancelled.is_set()

    def delta(self) -> Delta:
        said = self.got.get(timeout=HANG_S)
        assert isinstance(said, Delta), said
        return said

    def error(self) -> ParaServeError:
        said = self.got.get(timeout=HANG_S)
        assert isinstance(said, ParaServeError), said
        return said

    def move_to(self) -> tuple[str, Resume]:
        said = self.got.get(timeout=HANG_S)
        assert isinstance(said, tuple), said
        return said


class Gauges:
    def __init__(self) -> None:
        self.states: queue.SimpleQueue[LoopState] = queue.SimpleQueue()

    def update(self, state: LoopState) -> None:
        self.states.put(state)

    def wait_for(self, wanted: Callable[[LoopState], bool]) -> None:
        while not wanted(self.states.get(timeout=HANG_S)):
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    role: ExternalRole
    engine: ScriptedEngine
    gauges: Gauges

    def ask(self, wanted: GenerateRequest, resume: Resume | None = None) -> Reply:
        reply = Reply()
        self.role.add(wanted, reply, resume)
        return reply

    def submitted(self) -> EngineRequest:
        return self.engine.submitted.get(timeout=HANG_S)


def request(**changes: object) -> GenerateRequest:
    fields: dict[str, Any] = {
        "text": "w5 w6",
        "input_ids": None,
        "sampling": Sampling(seed=7),
        "max_tokens": 6,
        "is_stream": True,
        **changes,
    }
    return GenerateRequest(**fields)


def resume(*token_ids: int, **changes: object) -> Resume:
    tokens = tuple(ChosenToken(token_id=each, logprob=-1.0, ranking=None) for each in token_ids)
    fields: dict[str, Any] = {"seed": 7, "max_tokens": 6, "tokens": tokens, **changes}
    return Resume(**fields)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_model(folder, eos_token_id=3)
    write_words(folder)
    return folder


@pytest.fixture
def config(checkpoint: Path) -> GenerateConfig:
    kv = KvConfig(num_blocks=10, block_size=16)
    return make_generate_config(weights_from(checkpoint), kv=kv)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    engine = ScriptedEngine()
    module = SimpleNamespace(make=lambda: engine)
    monkeypatch.setitem(sys.modules, "scripted_engine", module)
    write_engine_package(tmp_path, "scripted", {"scripted": "scripted_engine:make"})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SCRIPTED_ENGINE", "0")
    return engine


@pytest.fixture
def bench(engine: ScriptedEngine, config: GenerateConfig) -> Iterator[Bench]:
    gauges = Gauges()
    role = ExternalRole("scripted", config, gauges)
    yield Bench(role=role, engine=engine, gauges=gauges)
    role.close()
    assert engine.is_stopped


def test_the_engine_gets_a_model_folder_and_the_replicas_limits(bench: Bench) -> None:
    import os

    settings = bench.engine.settings
    assert settings is not None
    assert (settings.model_dir / "config.json").is_file()
    assert (settings.max_context, settings.kv_tokens) == (160, 160)
    assert (settings.dtype, settings.max_sequences) == ("float32", 4)
    assert os.environ["SCRIPTED_ENGINE"] == "1"


def test_tokens_become_text_as_they_come(bench: Bench) -> None:
    reply = bench.ask(request(max_tokens=3))
    wanted = bench.submitted()
    assert wanted.prompt_ids == (5, 6)
    assert (wanted.max_tokens, wanted.end_ids) == (3, frozenset({3}))
    bench.engine.give([7])
    assert reply.delta().text.strip() == "w7"
    bench.engine.give([8, 9])
    assert [(d.text.strip(), d.finish_reason) for d in (reply.delta(), reply.delta())] == [
        ("w8", None),
        ("w9", "length"),
    ]
    assert bench.engine.closed.get(timeout=HANG_S) == wanted.request_id


def test_an_end_token_ends_the_answer_even_if_the_engine_goes_on(bench: Bench) -> None:
    reply = bench.ask(request(is_stream=False))
    bench.engine.give([7, 3, 9])
    delta = reply.delta()
    assert (delta.token_ids, delta.finish_reason) == ((7, 3), "stop")
    bench.engine.closed.get(timeout=HANG_S)


def test_a_stop_word_ends_it_too(bench: Bench) -> None:
    reply = bench.ask(request(is_stream=False, stop_words=("w8",)))
    bench.engine.give([7])
    bench.engine.give([8])
    delta = reply.delta()
    assert (delta.text.strip(), delta.finish_reason) == ("w7", "stop")
    bench.engine.closed.get(timeout=HANG_S)


def test_a_cancelled_request_is_dropped_while_the_engine_is_silent(bench: Bench) -> None:
    reply = bench.ask(request())
    bench.submitted()
    reply.cancelled.set()
    assert isinstance(reply.error(), Cancelled)
    bench.engine.closed.get(timeout=HANG_S)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"bad_words": ("w1",)}, "bad_words"),
        ({"sampling": Sampling(steering=Steering(min_p=0.1))}, "min_p"),
        ({"sampling": Sampling(steering=Steering(repetition_penalty=2.0))}, "repetition_penalty"),
        ({"sampling": Sampling(steering=Steering(frequency_penalty=1.0))}, "frequency_penalty"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(
    bench: Bench, changes: dict[str, object], setting: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"'{setting}' is not something the engine scripted"):
        bench.ask(request(**changes))


def test_what_it_cannot_do_for_a_resumed_request_is_refused_then(bench: Bench) -> None:
    penalised = request(sampling=Sampling(steering=Steering(presence_penalty=1.0)))
    bench.ask(penalised)
    with pytest.raises(InvalidRequest, match="'presence_penalty' cannot be carried over"):
        bench.ask(penalised, resume(7))


def test_log_probabilities_are_asked_for_only_where_they_are_wanted(bench: Bench) -> None:
    bench.ask(request())
    assert bench.submitted().num_logprobs is None
    bench.ask(request(wanted=WantedOutputs(cumulative_logprob=True)))
    assert (wanted := bench.submitted()).num_logprobs == 0
    assert not wanted.is_ranked
    ranked = Sampling(steering=Steering(num_logprobs=2))
    bench.ask(request(sampling=ranked, wanted=WantedOutputs(logprobs=True)))
    assert (wanted := bench.submitted()).num_logprobs == 2
    assert wanted.is_ranked


def test_the_engine_goes_on_where_another_replica_stopped(bench: Bench) -> None:
    asked = request(min_tokens=4, wanted=WantedOutputs(cumulative_logprob=True))
    reply = bench.ask(asked, resume(7, 8))
    wanted = bench.submitted()
    assert wanted.prompt_ids == (5, 6, 7, 8)
    assert (wanted.max_tokens, wanted.min_tokens) == (4, 2)
    assert wanted.sampling.seed != 7
    bench.engine.give([9])
    delta = reply.delta()
    # Nothing that the client has is sent again, and everything it has counts.
    assert (delta.token_ids, delta.text.strip()) == ((9,), "w9")
    assert (delta.num_input_tokens, delta.num_output_tokens) == (2, 3)
    assert delta.cumulative_logprob == -2.5
    bench.engine.give([10, 11, 12])
    assert [reply.delta().finish_reason for _ in range(3)] == [None, None, "length"]


def test_an_unstreamed_answer_has_the_tokens_of_both_replicas(bench: Bench) -> None:
    reply = bench.ask(request(is_stream=False, max_tokens=4), resume(7, 8, max_tokens=4))
    bench.engine.give([9, 10])
    delta = reply.delta()
    assert delta.token_ids == (7, 8, 9, 10)
    assert delta.text.split() == ["w7", "w8", "w9", "w10"]


def test_a_hand_over_ends_what_can_be_followed_with_all_that_is_needed(bench: Bench) -> None:
    stays, goes = bench.ask(request()), bench.ask(request(max_tokens=5), resume(max_tokens=5))
    for _ in range(2):
        bench.submitted()
    # The script is shared: who has waited longest takes the next step.
    for reply in (stays, goes):
        bench.engine.give([7])
        assert reply.delta().token_ids == (7,)
    bench.role.hand_over((OTHER,))
    replica, moved = goes.move_to()
    assert replica == "d.2"
    assert (moved.ticket, moved.seed, moved.max_tokens) == (0, 7, 5)
    assert [token.token_id for token in moved.tokens] == [7]
    bench.engine.give([8])
    assert stays.delta().token_ids == (8,)
    late = bench.ask(request(), resume())
    assert late.move_to()[1].tokens == ()
    bench.gauges.wait_for(lambda state: state.requests_moved == 2)


def test_a_hand_over_is_shared_out(bench: Bench) -> None:
    replies = [bench.ask(request(), resume()) for _ in range(4)]
    for _ in replies:
        bench.submitted()
    bench.role.hand_over((OTHER, replace(OTHER, replica="d.3")))
    assert sorted(reply.move_to()[0] for reply in replies) == ["d.2", "d.2", "d.3", "d.3"]


def test_what_was_handed_over_can_be_gone_on_with_here(bench: Bench) -> None:
    reply = bench.ask(request(), resume())
    bench.engine.give([7, 8])
    reply.delta(), reply.delta()
    bench.role.hand_over((OTHER,))
    _, moved = reply.move_to()
    bench.role.hand_over(())
    assert bench.submitted().prompt_ids == (5, 6)
    again = bench.ask(request(), Resume.decode(moved.encode()))
    assert bench.submitted().prompt_ids == (5, 6, 7, 8)
    bench.engine.give([9])
    assert again.delta().token_ids == (9,)


def test_an_answer_that_the_engine_breaks_off_is_an_error(bench: Bench) -> None:
    reply = bench.ask(request())
    bench.engine.give([7])
    bench.engine.give(None)
    reply.delta()
    assert "before its time" in str(reply.error())


def test_a_failed_request_is_not_quoted_to_the_client_and_the_others_go_on(bench: Bench) -> None:
    lost = bench.ask(request())
    bench.engine.give(ZeroDivisionError("/secret/path.py"))
    error = lost.error()
    assert isinstance(error, Unavailable)
    assert "secret" not in str(error)
    after = bench.ask(request(max_tokens=1))
    bench.engine.give([7])
    assert after.delta().finish_reason == "length"


def test_gauges_show_the_engines_state_while_it_works_and_zero_after(bench: Bench) -> None:
    reply = bench.ask(request(max_tokens=1))
    bench.gauges.wait_for(
        lambda state: (state.running, state.waiting, state.kv_blocks_used) == (1, 2, 5)
    )
    bench.engine.give([7])
    reply.delta()
    bench.gauges.wait_for(lambda state: state == LoopState())


def test_unloading_tells_whoever_is_still_running(
    engine: ScriptedEngine, config: GenerateConfig
) -> None:
    bench = Bench(role=ExternalRole("scripted", config, Gauges()), engine=engine, gauges=Gauges())
    reply = bench.ask(request())
    bench.submitted()
    bench.role.close()
    assert "being unloaded" in str(reply.error())
    assert engine.is_stopped


def test_a_dead_engine_ends_the_thread_and_so_the_process(
    engine: ScriptedEngine, config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: queue.SimpleQueue[type[BaseException]] = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda args: died.put(args.exc_type))
    role = ExternalRole("scripted", config, Gauges())
    bench = Bench(role=role, engine=engine, gauges=Gauges())
    first, second = bench.ask(request()), bench.ask(request())
    for _ in range(2):
        bench.submitted()
    engine.give(EngineDead("gone"))
    errors = {str(first.error()), str(second.error())}
    assert all("again" in error for error in errors)
    assert died.get(timeout=HANG_S) is EngineDead
    assert engine.is_stopped
    role.close()


def test_an_engine_that_does_not_start_fails_the_load_and_leaves_nothing(
    engine: ScriptedEngine, config: GenerateConfig
) -> None:
    engine.start_error = RuntimeError("no GPU")
    with pytest.raises(Unavailable, match="scripted did not start: RuntimeError: no GPU"):
        ExternalRole("scripted", config, Gauges())
    assert engine.is_stopped
    assert engine.settings is not None
    assert not engine.settings.model_dir.exists()


@pytest.mark.parametrize(
    ("device", "environ", "visible"),
    [
        ("cpu", {}, {}),
        ("cuda:1", {}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("cuda", {}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,GPU-6"}, {"CUDA_VISIBLE_DEVICES": "GPU-6"}),
    ],
)
def test_an_engine_sees_its_gpu_alone(
    device: str, environ: dict[str, str], visible: dict[str, str]
) -> None:
    assert visible_devices(device, environ) == visible


# ---- what fails of one request ----


class PanicException(BaseException):
    """As a package written in Rust raises it."""


def raising(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise error("a prompt")

    return fail


@pytest.mark.parametrize("error", [RuntimeError, PanicException])
@pytest.mark.parametrize("method", ["send", "is_cancelled"])
def test_a_request_that_fails_ends_alone_and_is_not_quoted(
    bench: Bench, method: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    broken = Reply()
    setattr(broken, method, raising(error))
    bench.role.add(request(), broken)
    bench.submitted()
    bench.engine.give([7])
    failed = broken.error() if method == "send" else until_error(broken)
    assert (type(failed), str(failed)) == (ParaServeError, "internal error")
    bench.engine.closed.get(timeout=HANG_S)
    after = bench.ask(request(max_tokens=1))
    bench.engine.give([7])
    assert after.delta().finish_reason == "length"
    assert "a prompt" not in caplog.text.replace('error("a prompt")', "")


def until_error(reply: Reply) -> ParaServeError:
    while not isinstance(said := reply.got.get(timeout=HANG_S), ParaServeError):
        pass
    return said


def test_a_reply_that_cannot_fail_or_move_ends_nothing(bench: Bench) -> None:
    mute, stuck = Reply(), Reply()
    mute.fail = raising(RuntimeError)  # type: ignore[method-assign]
    stuck.move = raising(RuntimeError)  # type: ignore[method-assign]
    for reply, begun in ((mute, None), (stuck, resume())):
        bench.role.add(request(), reply, begun)
        bench.submitted()
    mute.cancelled.set()
    bench.role.hand_over((OTHER,))
    assert str(stuck.error()) == "internal error"
    bench.role.hand_over(())
    for _ in (mute, stuck):
        bench.engine.closed.get(timeout=HANG_S)
    after = bench.ask(request(max_tokens=1))
    bench.engine.give([7])
    assert after.delta().finish_reason == "length"


def test_a_request_that_moves_before_its_task_has_begun_is_answered(bench: Bench) -> None:
    replies = [bench.ask(request(), resume()) for _ in range(20)]
    bench.role.hand_over((OTHER,))
    assert [reply.move_to()[0] for reply in replies] == ["d.2"] * 20


def test_a_request_that_cannot_be_carried_on_stays_where_it_is(bench: Bench) -> None:
    penalised = request(sampling=Sampling(steering=Steering(presence_penalty=1.0)), max_tokens=1)
    reply = bench.ask(penalised, resume(max_tokens=1))
    bench.submitted()
    bench.role.hand_over((OTHER,))
    bench.engine.give([7])
    assert reply.delta().finish_reason == "length"


def test_one_request_too_many_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.role._host, "_most_jobs", 1)
    bench.ask(request())
    assert isinstance(bench.ask(request()).error(), ResourceExhausted)
    bench.ask(request(), resume(7))
    assert len(bench.submitted().prompt_ids) == 2
    assert len(bench.submitted().prompt_ids) == 3


# ---- whether it lives ----


def probe(bench: Bench) -> ParaServeError | None:
    said: queue.SimpleQueue[ParaServeError | None] = queue.SimpleQueue()
    bench.role.probe(said.put)
    return said.get(timeout=HANG_S)


def test_a_probe_is_answered_by_the_engines_loop(bench: Bench) -> None:
    assert probe(bench) is None
    bench.ask(request())
    assert probe(bench) is None


def test_an_engine_that_takes_no_step_is_said_to_hang(bench: Bench) -> None:
    now_s = 1000.0
    bench.role._host._steps = PassClock(lambda: now_s)
    reply = bench.ask(request())
    bench.submitted()
    bench.engine.give([7])
    reply.delta()
    now_s += 2.5
    error = probe(bench)
    assert isinstance(error, Unavailable)
    assert "does not return" in str(error)
    bench.engine.give([8])
    reply.delta()
    assert probe(bench) is None


def test_a_probe_of_an_engine_that_has_ended_is_an_error(
    engine: ScriptedEngine, config: GenerateConfig
) -> None:
    role = ExternalRole("scripted", config, Gauges())
    role.close()
    with pytest.raises(Unavailable):
        role.probe(lambda _: None)


def test_the_pulse_beats_while_the_engine_serves(
    engine: ScriptedEngine, config: GenerateConfig, tmp_path: Path
) -> None:
    path = tmp_path / "pulses" / "d.1"
    role = ExternalRole("scripted", config, Gauges(), path)
    gauges = role._host._gauges
    assert isinstance(gauges, Gauges)
    gauges.states.get(timeout=HANG_S)
    assert path.exists()
    role.close()
    assert not path.exists()
