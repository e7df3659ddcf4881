from __future__ import annotations

import argparse
import subprocess
import sys
import typing
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from paraserve_backend.agent.config import AgentConfig
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.auth import TOKEN_HEADER
from paraserve_backend.rpc.paraserve_pb2_grpc import (
    SchedulerServicer,
    add_SchedulerServicer_to_server,
)
from paraserve_scheduler.cli.main import build_parser, main
from paraserve_scheduler.cli.parsing import size_bytes
from paraserve_scheduler.control_plane.config import SchedulerConfig
from paraserve_scheduler.gateway.config import GatewayConfig

COMMANDS = (
    *("up", "down", "deploy", "generate", "status", "timeline", "delete", "migrate", "drain"),
    *("explain", "simulate"),
    *("agent", "scheduler", "gateway", "install-backend", "doctor"),
)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("PARASERVE_SCHEDULER", "PARASERVE_GATEWAY", "PARASERVE_TOKEN"):
        monkeypatch.delenv(name, raising=False)


class FakeScheduler(SchedulerServicer):
    """Knows one deployment and refuses its status without the token."""

    def __init__(self) -> None:
        self.specs: list[pb.DeploymentSpec] = []
        #: What the next calls of Status say of the deployment's replicas, one each; the last stays.
        self.replicas: list[list[pb.ReplicaStatus]] = [[]]
        #: What the next calls of Drain answer, one each.
        self.left: list[pb.DrainReply] = []
        self.drains: list[pb.DrainRequest] = []

    def Deploy(
        self, request: pb.DeploymentSpec, context: grpc.ServicerContext
    ) -> pb.DeploymentStatus:
        if request.source == "s3://missing/x":
            context.abort(grpc.StatusCode.NOT_FOUND, "There is no bucket 'missing'.")
        self.specs.append(request)
        return pb.DeploymentStatus(
            spec=request, architecture="LlamaForCausalLM", weight_bytes=227_000_000
        )

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.ClusterStatus:
        if dict(context.invocation_metadata()).get(TOKEN_HEADER) != "secret":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "The cluster token is missing or wrong.")
        return pb.ClusterStatus(
            nodes=[pb.NodeView(info=pb.NodeInfo(name="node1"), alive=True, cordoned=True)],
            deployments=[
                pb.DeploymentStatus(
                    spec=pb.DeploymentSpec(name="tiny"),
                    replicas=self.replicas.pop(0) if self.replicas[1:] else self.replicas[0],
                )
            ],
        )

    def Migrate(self, request: pb.MigrateRequest, context: grpc.ServicerContext) -> pb.MigrateReply:
        if request.node == "n7":
            context.abort(grpc.StatusCode.NOT_FOUND, "There is no node 'n7'. Nodes: n0.")
        return pb.MigrateReply(replica="tiny.1", successor="tiny.2")

    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainReply:
        self.drains.append(request)
        return self.left.pop(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    address: str
    scheduler: FakeScheduler


@pytest.fixture
def served() -> Iterator[Served]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    scheduler = FakeScheduler()  # type: ignore[abstract] # the other calls are not made
    add_SchedulerServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Served(address=f"127.0.0.1:{port}", scheduler=scheduler)
    server.stop(None).wait()


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_every_command_is_listed_with_what_it_does() -> None:
    text = build_parser().format_help()
    assert set(subparsers(build_parser())) == set(COMMANDS)
    assert all(command in text for command in COMMANDS)
    assert "examples:" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"paraserve {command}" in capsys.readouterr().out


def test_every_flag_of_our_commands_is_explained() -> None:
    for name, parser in subparsers(build_parser()).items():
        for action in parser._actions:
            assert action.help or not action.option_strings, f"{name} {action.option_strings}"


@pytest.mark.parametrize("config", [AgentConfig, SchedulerConfig, GatewayConfig])
def test_every_setting_of_a_daemon_is_explained(config: type[object]) -> None:
    hints = typing.get_type_hints(config, include_extras=True)
    assert [name for name, hint in hints.items() if not hasattr(hint, "__metadata__")] == []


def test_a_daemons_help_says_what_a_setting_is_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["gateway", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Where it serves gRPC, host:port. (default: 127.0.0.1:8001)" in shown
    assert "host:port of the scheduler. (required)" in shown


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["fly"],
        ["deploy", "tiny"],
        ["deploy", "tiny", "--source", "/x", "--ttft-slo", "nan"],
        ["deploy", "tiny", "--source", "/x", "--tpot-slo", "0"],
        ["deploy", "tiny", "--source", "/x", "--keep-alive", "-1"],
        ["up", "--nodes", "0"],
        ["up", "--node-memory", "4 cups"],
    ],
)
def test_wrong_usage_exits_with_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert "usage: paraserve" in capsys.readouterr().err


def test_without_a_cluster_a_command_says_how_to_get_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["status"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("paraserve: No local cluster 'default' is up: run paraserve up")
    assert said.count("\n") == 1


def test_an_address_where_nobody_listens_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--scheduler", "127.0.0.1:1"]) == 1
    assert "No scheduler answers at 127.0.0.1:1" in capsys.readouterr().err


def test_the_environment_names_a_cluster_and_its_token(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARASERVE_SCHEDULER", served.address)
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "paraserve: The cluster token is missing or wrong.\n"
    monkeypatch.setenv("PARASERVE_TOKEN", "secret")
    assert main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "node1" in shown
    assert "at zero" in shown


def test_deploy_sends_what_the_flags_say(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"deploy tiny --source s3://models/tiny --ttft-slo 2.5 --keep-alive 30 "
        f"--max-stages 3 --device cpu --scheduler {served.address}"
    )
    assert main(words.split()) == 0
    assert "LlamaForCausalLM, 227 MB" in capsys.readouterr().out
    (spec,) = served.scheduler.specs
    assert (spec.name, spec.source, spec.device) == ("tiny", "s3://models/tiny", "cpu")
    assert (spec.ttft_slo_s, spec.keep_alive_s, spec.max_stages) == (2.5, 30.0, 3)


@pytest.mark.parametrize(("flags", "consolidate"), [([], True), (["--no-consolidate"], False)])
def test_consolidation_can_be_turned_off(
    served: Served, flags: list[str], consolidate: bool
) -> None:
    words = f"deploy tiny --source s3://models/tiny --scheduler {served.address}"
    assert main([*words.split(), *flags]) == 0
    assert served.scheduler.specs[0].consolidate is consolidate


def _moved(old: pb.Phase.ValueType, new: pb.Phase.ValueType) -> list[pb.ReplicaStatus]:
    return [
        pb.ReplicaStatus(replica="tiny.1", phase=old, successors=["tiny.2"]),
        pb.ReplicaStatus(replica="tiny.2", phase=new, succeeds="tiny.1"),
    ]


@pytest.fixture
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARASERVE_TOKEN", "secret")


@pytest.mark.usefixtures("_token")
def test_a_move_returns_when_nothing_is_left_of_the_old_replica(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    served.scheduler.replicas = [
        _moved(pb.READY, pb.STARTING),
        _moved(pb.READY, pb.READY),
        _moved(pb.STOPPED, pb.READY),
    ]
    assert main(["migrate", "tiny", "--to", "n1", "--scheduler", served.address]) == 0
    assert capsys.readouterr().out == "tiny.1 has become tiny.2 on n1.\n"
    assert len(served.scheduler.replicas) == 1


@pytest.mark.usefixtures("_token")
def test_a_move_that_fails_says_why(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    served.scheduler.replicas = [_moved(pb.READY, pb.STOPPING)]
    served.scheduler.replicas[0][1].failure.message = "Node n1 was lost."
    assert main(["migrate", "tiny", "--to", "n1", "--scheduler", served.address]) == 1
    said = capsys.readouterr().err
    assert "paraserve: tiny.2 did not take over: Node n1 was lost.\n" in said


def test_a_move_that_is_refused_says_why(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["migrate", "tiny", "--to", "n7", "--scheduler", served.address]) == 1
    assert capsys.readouterr().err == "paraserve: There is no node 'n7'. Nodes: n0.\n"


def test_a_drain_returns_when_the_node_is_empty(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = pb.DrainingReplica(replica="tiny.1", progress="moves at once")
    served.scheduler.left = [pb.DrainReply(replicas=[busy]), pb.DrainReply()]
    assert main(["drain", "n1", "--scheduler", served.address]) == 0
    assert capsys.readouterr().out == "Node n1 is empty.\n"
    assert [(drain.node, drain.undo) for drain in served.scheduler.drains] == [("n1", False)] * 2


def test_a_drain_can_be_undone(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    served.scheduler.left = [pb.DrainReply()]
    assert main(["drain", "n1", "--undo", "--scheduler", served.address]) == 0
    assert capsys.readouterr().out == "Node n1 is used again.\n"
    assert served.scheduler.drains[0].undo


@pytest.mark.usefixtures("_token")
def test_status_shows_what_takes_over_from_what_and_drained_nodes(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    served.scheduler.replicas = [_moved(pb.READY, pb.READY)]
    served.scheduler.replicas[0][0].hand_over_begin_s = 5.0
    served.scheduler.replicas[0][0].in_flight = 3
    assert main(["status", "--scheduler", served.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = next(line for line in lines if "tiny.1 ->" in line)
    assert "tiny.1 -> tiny.2  hands over 3" in shown
    assert any("alive, drained" in line for line in lines)


def test_a_folder_is_sent_as_an_absolute_path(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["deploy", "tiny", "--source", "here", "--scheduler", served.address]) == 0
    assert served.scheduler.specs[0].source == str(tmp_path / "here")


def test_the_schedulers_refusal_is_the_message(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"deploy tiny --source s3://missing/x --scheduler {served.address}"
    assert main(words.split()) == 1
    assert capsys.readouterr().err == "paraserve: There is no bucket 'missing'.\n"


def test_a_daemon_with_an_unknown_setting_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "gateway.yaml"
    settings.write_text("scheduler_adress: 127.0.0.1:1\n")
    assert main(["gateway", "--config", str(settings)]) == 1
    assert "did you mean 'scheduler_address'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29), ("100", 100), ("2kb", 2000)],
)
def test_sizes_may_have_units(text: str, expected: int) -> None:
    assert size_bytes(text) == expected


def test_the_command_line_starts_without_torch_and_without_the_servers() -> None:
    probe = (
        "import sys; from paraserve_scheduler.cli.main import build_parser; build_parser(); "
        "print(sorted({'torch', 'aiohttp', 'tritonclient', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
