"""The secrets and pulses of Triton models, and when a node makes, sends and removes them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from paraserve_backend.agent.run_files import RunFiles
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from tests.support.agents import AgentHarness, follow, head_part, model_files

LONG_S = 60


def files(node: AgentHarness) -> dict[str, str]:
    """Return every secret on the node by the Triton model whose it is."""
    secrets = RunDir(node.folder).secrets
    return {path.name: path.read_text() for path in secrets.glob("*")}


def part(replica: str = "tiny.1", **parameters: str) -> pb.Part:
    """Return a part with a full instance only."""
    config = model_files("generate", replica=replica, **parameters)
    return pb.Part(replica=replica, models=[pb.ModelFiles(name=replica, files=config)])


def hand_over(replica: str) -> pb.HandOverRequest:
    target = pb.HandOverTarget(replica="tiny.2", address="tcp://127.0.0.1:1")
    return pb.HandOverRequest(replica=replica, targets=[target])


async def with_slots(node: AgentHarness) -> None:
    node.slots.keep(1)
    node.now_s[0] += LONG_S
    await node.slots.tend()


def test_every_secret_is_long_new_and_hexadecimal(tmp_path: Path) -> None:
    run_files = RunFiles(RunDir(tmp_path))
    made = set()
    for _ in range(3):
        run_files.prepare("tiny.1")
        secret = run_files.secret("tiny.1")
        assert RunDir(tmp_path).secret_file("tiny.1").read_text() == secret
        assert len(bytes.fromhex(secret)) == 32
        made.add(secret)
    assert len(made) == 3


def test_what_an_earlier_agent_left_is_replaced_and_removed(tmp_path: Path) -> None:
    earlier, later = RunFiles(RunDir(tmp_path)), RunFiles(RunDir(tmp_path))
    earlier.prepare("tiny.1")
    later.prepare("tiny.1")
    assert later.secret("tiny.1") != earlier.secret("tiny.1")
    assert RunDir(tmp_path).secret_file("tiny.1").read_text() == later.secret("tiny.1")
    later.clear()
    assert list(tmp_path.iterdir()) == []
    assert later.secret("tiny.1") == ""


def test_a_new_process_of_a_model_has_no_pulse_of_an_old_one(tmp_path: Path) -> None:
    run_files = RunFiles(RunDir(tmp_path))
    run_files.prepare("tiny.1")
    assert run_files.pulse("tiny.1") is None
    path = RunDir(tmp_path).pulse_file("tiny.1")
    path.parent.mkdir()
    path.touch()
    first = run_files.pulse("tiny.1")
    os.utime(path, ns=(0, 12345))
    assert (first is None, run_files.pulse("tiny.1")) == (False, 12345)
    run_files.prepare("tiny.1")
    assert run_files.pulse("tiny.1") is None


async def test_a_generate_model_has_a_secret_from_its_load_to_its_removal(
    node: AgentHarness,
) -> None:
    await follow(node, head_part())
    # A stage, a link and an ensemble take no commands.
    assert set(files(node)) == {"tiny.1"}
    await node.parts.remove("tiny.1")
    assert files(node) == {}


async def test_a_slot_keeps_its_secret_for_as_long_as_its_process_lives(node: AgentHarness) -> None:
    await with_slots(node)
    secrets = files(node)
    assert set(secrets) == {"slot-0.front", "slot-1.stage", "slot-2.link"}
    await follow(node, head_part())
    await node.parts.remove("tiny.1")
    assert files(node) == secrets
    await node.slots.remove_all()
    assert files(node) == {}


async def test_every_command_carries_the_secret_of_the_process_that_gets_it(
    node: AgentHarness,
) -> None:
    await follow(node, head_part("first.1"))
    await with_slots(node)
    await follow(node, head_part("tiny.1"))
    for replica in ("first.1", "tiny.1"):
        await node.parts.hand_over(hand_over(replica))
    secrets = files(node)
    await node.parts.remove("tiny.1")
    sent = node.triton.secrets
    assert len(sent) == 3 + 2 + 3  # binds, hand-overs, unbinds
    assert all(secret == secrets[model] for model, secret in sent)


async def test_secrets_reach_neither_logs_nor_the_model_repository_nor_reports(
    node: AgentHarness, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await with_slots(node)
    await follow(node, head_part("tiny.1"))
    await follow(node, part("other.1"))
    node.triton.command_error = InvalidRequest("no")
    with pytest.raises(InvalidRequest):
        await node.parts.hand_over(hand_over("tiny.1"))
    repository = [path.read_text() for path in node.folder.glob("models/*/*") if path.is_file()]
    told = [*repository, caplog.text, *map(str, node.parts.statuses())]
    secrets = files(node)
    assert len(secrets) == 4
    assert not any(secret in text for secret in secrets.values() for text in told)


@pytest.mark.parametrize(
    "parameters",
    [
        {"fetch_id": "secret.1.0"},
        {"fetch_id": "tiny.11.0"},
        {"fetch_id": "tiny.1"},
        {"key_file": "{run_dir}/keys/secret.1/curve.key"},
        {"key_file": "{run_dir}/keys/tiny.1/../secret.1/curve.key"},
        {"key_file": "/etc/passwd"},
        {"run_dir": "/dev/shm/elsewhere"},
    ],
)
@pytest.mark.parametrize("role", ["generate", "stage", "link"])
async def test_a_model_that_names_what_is_another_replicas_is_refused(
    node: AgentHarness, role: str, parameters: dict[str, str]
) -> None:
    named = {key: value.format(run_dir=node.folder) for key, value in parameters.items()}
    config = model_files(role, replica="tiny.1", **named)
    with pytest.raises(InvalidRequest, match=r"^Model tiny\.1 names"):
        await node.parts.apply(
            pb.Part(replica="tiny.1", models=[pb.ModelFiles(name="tiny.1", files=config)])
        )
    await node.assert_nothing_left()


async def test_a_model_that_is_called_another_replica_is_refused(node: AgentHarness) -> None:
    config = model_files("generate", replica="secret.1")
    with pytest.raises(InvalidRequest, match="names another replica"):
        await node.parts.apply(
            pb.Part(replica="tiny.1", models=[pb.ModelFiles(name="tiny.1", files=config)])
        )


async def test_a_model_that_names_its_own_weights_and_keys_is_taken(node: AgentHarness) -> None:
    own = {
        "run_dir": str(node.folder),
        "fetch_id": "tiny.1.0",
        "key_file": str(RunDir(node.folder).key_file("tiny.1")),
    }
    assert (await follow(node, part(**own)))[-1].phase == pb.READY
