from __future__ import annotations

import time

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.views.tables import pause_lines

UNTIL_S = 1_700_000_000.0


def status(*, deaths: int = 0, until_s: float = UNTIL_S) -> pb.ClusterStatus:
    failures = ["It died first.", "It died last."]
    replicas = [
        pb.ReplicaStatus(replica=f"d.{number}", failure=pb.Failure(message=message))
        for number, message in enumerate(failures, start=1)
    ]
    entry = pb.DeploymentStatus(
        spec=pb.DeploymentSpec(name="d"),
        replicas=[*replicas, pb.ReplicaStatus(replica="d.3")],
        starts_paused_until_s=until_s,
        recent_deaths=deaths,
    )
    return pb.ClusterStatus(deployments=[entry])


def test_a_pause_is_one_line_with_its_end_and_the_last_reason() -> None:
    at = time.strftime("%H:%M:%S", time.localtime(UNTIL_S))
    assert [*pause_lines(status(deaths=5))] == [
        f"d: starts paused until {at}, 5 replicas died in the last five minutes: It died last."
    ]
    assert [*pause_lines(status())] == [f"d: starts paused until {at}: It died last."]


def test_without_a_pause_there_is_no_line() -> None:
    assert [*pause_lines(status(deaths=4, until_s=0))] == []
