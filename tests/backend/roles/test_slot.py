"""What a slot may become, and for whom it works."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from paraserve_backend.errors import (
    AlreadyExists,
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
)
from paraserve_backend.protocol.names import SlotKind
from paraserve_backend.protocol.parameters import RoleConfig, SlotConfig
from paraserve_backend.roles.slot import (
    SlotCommand,
    SlotRole,
    at_low_priority,
    import_all,
    read_slot_command,
)

RUN_DIR = Path("/dev/shm/run")
FRONT = SlotConfig(kind=SlotKind.FRONT, device="cpu", run_dir=RUN_DIR)
STAGE = SlotConfig(kind=SlotKind.STAGE, device="cpu", run_dir=RUN_DIR)
LINK = SlotConfig(kind=SlotKind.LINK, device="cpu", run_dir=RUN_DIR)
WEIGHTS = {
    "replica": "d.1",
    "run_dir": str(RUN_DIR),
    "fetch_id": "d.1.0",
    "device": "cpu",
    "kv_blocks": "4",
    "key_file": f"{RUN_DIR}/keys/d.1/curve.key",
}
CHANNEL = {"listen": "tcp://127.0.0.1:1", "next": "tcp://127.0.0.1:2"}
GENERATE = WEIGHTS | {"role": "generate", "deployment": "d"}
LAYERS = WEIGHTS | CHANNEL | {"role": "stage", "layers": "1:2/2"}
CHANNEL_END = {
    "role": "link",
    "replica": "d.1",
    "forward_timeout_s": "1",
    "key_file": WEIGHTS["key_file"],
} | CHANNEL


def meant_for(replica: str) -> dict[str, str]:
    key_file = f"{RUN_DIR}/keys/{replica}/curve.key"
    return GENERATE | {"replica": replica, "fetch_id": f"{replica}.0", "key_file": key_file}


class FakeRole:
    def __init__(self, config: RoleConfig) -> None:
        self.config = config
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def make_slot(config: SlotConfig = FRONT) -> SlotRole[FakeRole]:
    return SlotRole(config, FakeRole)


# ---- what it may become ----


@pytest.mark.parametrize(
    ("slot", "parameters"), [(FRONT, GENERATE), (STAGE, LAYERS), (LINK, CHANNEL_END)]
)
def test_a_slot_becomes_the_model_it_is_told(slot: SlotConfig, parameters: dict[str, str]) -> None:
    role = make_slot(slot)
    role.bind(parameters)
    with role.use("d.1") as bound:
        assert bound.config.replica == "d.1"


@pytest.mark.parametrize(
    ("slot", "parameters", "sentence"),
    [
        (FRONT, LAYERS, "role generate only"),
        (STAGE, GENERATE, "role stage only"),
        (LINK, LAYERS, "role link only"),
        (FRONT, GENERATE | {"run_dir": "/dev/shm/other"}, "weights in its own run_dir"),
        (FRONT, GENERATE | {"run_dir": f"{RUN_DIR}/../other"}, "weights in its own run_dir"),
        (STAGE, LAYERS | {"source": "s3://models/secret"}, "weights in its own run_dir"),
        (STAGE, LAYERS | {"key_file": "/etc/passwd"}, "its own key in its own run_dir"),
        (LINK, CHANNEL_END | {"key_file": f"{RUN_DIR}/keys/../../x"}, "its own key"),
        (LINK, CHANNEL_END | {"key_file": f"{RUN_DIR}/keys/e.1/curve.key"}, "its own key"),
        (LINK, CHANNEL_END | {"key_file": f"{RUN_DIR}/keys/d.1/../d.1/curve.key"}, "its own key"),
        (FRONT, GENERATE | {"key_file": ""}, "its own key"),
        (FRONT, GENERATE | {"fetch_id": "secret.1.0"}, "its own fetch"),
        (FRONT, GENERATE | {"fetch_id": "d.10.0"}, "its own fetch"),
        (FRONT, GENERATE | {"fetch_id": "d.1"}, "its own fetch"),
        (STAGE, LAYERS | {"fetch_id": "d.1./../secret.1.0"}, "its own fetch"),
        (STAGE, LAYERS | {"fetch_id": "d.1.00"}, "its own fetch"),
        (FRONT, GENERATE | {"replica": "../d.1"}, "replicas only"),
        (FRONT, GENERATE | {"replica": "d"}, "replicas only"),
        (STAGE, LAYERS | {"device": "cuda:0"}, "on cpu only"),
        (FRONT, GENERATE | {"engine": "vllm"}, "engine paraserve only"),
        (FRONT, GENERATE | {"role": "slot"}, "'role' is 'slot'"),
        (FRONT, {}, "'role' is missing"),
    ],
)
def test_a_slot_refuses_what_its_agent_cannot_mean(
    slot: SlotConfig, parameters: dict[str, str], sentence: str
) -> None:
    role = make_slot(slot)
    with pytest.raises(InvalidRequest, match=sentence):
        role.bind(parameters)
    with pytest.raises(NotFound):
        role.use("d.1").__enter__()


def test_a_bound_slot_stays_what_it_is(tmp_path: Path) -> None:
    slot = make_slot()
    slot.bind(GENERATE)
    with pytest.raises(AlreadyExists, match=r"is d\.1 already"):
        slot.bind(meant_for("d.2"))
    with slot.use("d.1") as role:
        assert not role.is_closed


def test_a_slot_whose_bind_failed_is_idle() -> None:
    def fail(_config: RoleConfig) -> FakeRole:
        raise InvalidCheckpoint("Tensor x is missing.")

    slot = SlotRole(FRONT, fail)
    with pytest.raises(InvalidCheckpoint, match=r"Tensor x is missing\."):
        slot.bind(GENERATE)
    with pytest.raises(NotFound):
        slot.use("d.1").__enter__()
    slot.unbind()


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ('{"bind": {"role": "link"}}', SlotCommand(bind={"role": "link"})),
        ('{"unbind": true}', SlotCommand(bind=None)),
        ('{"unbind": false}', None),
        ('{"bind": "x"}', None),
        ('{"hand_over": []}', None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_only_binds_and_unbinds_are_a_slots_own_commands(
    text: str | None, command: SlotCommand | None
) -> None:
    assert read_slot_command(text) == command


# ---- for whom it works ----


@pytest.mark.parametrize("replica", ["d.2", "", None])
def test_requests_for_another_replica_are_refused(replica: str | None) -> None:
    slot = make_slot()
    slot.bind(GENERATE)
    with pytest.raises(NotFound, match="is not here"):
        slot.use(replica).__enter__()


def test_after_an_unbind_only_the_next_replica_is_served() -> None:
    slot = make_slot()
    slot.bind(GENERATE)
    with slot.use("d.1") as first:
        pass
    slot.unbind()
    assert first.is_closed
    slot.bind(meant_for("e.1") | {"deployment": "e"})
    with pytest.raises(NotFound):
        slot.use("d.1").__enter__()
    with slot.use("e.1") as second:
        assert second is not first


def test_a_role_is_not_closed_while_a_request_uses_it() -> None:
    slot = make_slot()
    slot.bind(GENERATE)
    with slot.use("d.1") as role:
        unbinding = threading.Thread(target=slot.unbind)
        unbinding.start()
        unbinding.join(timeout=0.05)
        assert unbinding.is_alive()
        assert not role.is_closed
    unbinding.join()
    assert role.is_closed


def test_while_it_is_bound_a_slot_refuses_requests_at_once() -> None:
    building, go_on = threading.Event(), threading.Event()

    def build(config: RoleConfig) -> FakeRole:
        building.set()
        go_on.wait()
        return FakeRole(config)

    slot = SlotRole(FRONT, build)
    binding = threading.Thread(target=slot.bind, args=(GENERATE,))
    binding.start()
    building.wait()
    with pytest.raises(NotFound):
        slot.use("d.1").__enter__()
    go_on.set()
    binding.join()
    with slot.use("d.1") as role:
        assert role.config.replica == "d.1"


# ---- its priority ----


def test_what_nobody_waits_for_leaves_the_processor_to_others_and_what_serves_does_not() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, seen = priority(), list[int]()
    at_low_priority(lambda: seen.append(priority()))
    assert seen == [19]
    assert priority() == before


def test_what_fails_there_fails_here() -> None:
    def fail() -> None:
        raise ImportError("no torch")

    with pytest.raises(ImportError, match="no torch"):
        at_low_priority(fail)


def test_a_slot_computes_on_no_thread_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP would keep helpers for it, beside those of the thread that serves later."""
    computed: list[threading.Thread] = []
    monkeypatch.setattr(torch, "matmul", lambda *_: computed.append(threading.current_thread()))
    import_all(STAGE)
    assert [thread.is_alive() for thread in computed] == [False]
