from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.cli import simulate
from paraserve_scheduler.policies.registry import POLICIES
from paraserve_scheduler.simulator.description import read_cluster

TESTBED = Path(simulate.__file__).parents[1] / "simulator" / "testbeds" / "hydraserve-ii.yaml"
CLUSTER = """
kinds:
  - name: gpu
    workers: [{name: any, runtime_s: 2.0, tail_s: 0.5, load_s_per_gb: 0.1}]
    speeds: [{model: small, prefill_s_per_1000: 0.2, decode_s: 0.02}]
nodes: [{name: n, kind: gpu, count: 2, nic_gbit: 25, gpus: 2, gpu_gb: 24, memory_gb: 64}]
models: [{name: small, size_gb: 8, num_layers: 16, kv_gb: 2}]
deployments: [{name: d, model: small, count: 3, ttft_slo_s: 10, tpot_slo_s: 0.1}]
"""


def _run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    simulate.add_commands(parser.add_subparsers())
    arguments = parser.parse_args(["simulate", *argv])
    return int(arguments.run(arguments, {}))


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER)
    return str(path)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_runs_from_the_command_line(
    policy: str, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--cluster", cluster, "--policy", policy, "--duration", "60", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["policy"] == policy
    assert summary["all"]["requests"] > 10
    assert summary["all"]["ttft_met"] == 1.0


def test_a_trace_is_simulated_and_drawn(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, chrome = tmp_path / "trace.csv", tmp_path / "chrome.json"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
    )
    assert _run("--cluster", cluster, "--trace", str(trace), "--chrome", str(chrome)) == 0
    assert "GPU-GB·s per request" in capsys.readouterr().out
    assert json.loads(chrome.read_text())["traceEvents"]


def test_a_functions_trace_is_known_by_its_columns(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("app,func,end_timestamp,duration\na,f,1.0,0.5\na,g,2.0,0.5\n")
    assert _run("--cluster", cluster, "--trace", str(trace), "--json") == 0
    assert json.loads(capsys.readouterr().out)["all"]["requests"] == 2


def test_an_empty_trace_is_refused(cluster: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(InvalidRequest, match="the trace is empty"):
        _run("--cluster", cluster, "--trace", str(trace))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("kind: gpu", "kind: tpu"), "is of no kind 'tpu'"),
        (("{name: d, model: small", "{name: d, model: huge"), "no model 'huge'"),
        (("nic_gbit", "nic_gbits"), "did you mean 'nodes.0..nic_gbit|Unknown setting"),
    ],
)
def test_a_wrong_description_is_refused(
    wrong: tuple[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER.replace(*wrong))
    with pytest.raises(InvalidRequest, match=message):
        read_cluster(path, "paraserve")


def test_the_papers_testbed_is_described() -> None:
    cluster = read_cluster(TESTBED, "hydraserve")
    assert len(cluster.deployments) == 384
    sizes = [len(node.gpu_bytes) for node in cluster.nodes]
    assert (len(sizes), sum(sizes)) == (6, 24)
    assert not cluster.nodes[0].kind.start.is_instant
