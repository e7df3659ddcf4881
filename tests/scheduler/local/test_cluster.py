from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.errors import InvalidRequest, Unavailable
from paraserve_backend.tritonserver.host.install import find_triton
from paraserve_scheduler.local.children import (
    Child,
    ProcessSpec,
    start,
    stop,
)
from paraserve_scheduler.local.cluster import (
    UpOptions,
    delayed_signals,
    down,
    files_of,
    find,
    make_layout,
)
from paraserve_scheduler.local.layout import (
    SHM,
    ClusterFiles,
    ClusterLayout,
    NodeLayout,
    Process,
    RunningCluster,
    check_name,
    ensure_secrets,
    read_running,
    read_s3_key,
    sweep,
    write_running,
)
from paraserve_scheduler.local.lock import locked, owner
from paraserve_scheduler.local.ports import PortPicker, is_free
from paraserve_scheduler.local.processes import Machine, process_waves, write_files
from tests.support.limits import HANG_S


def make_files(tmp_path: Path, name: str = "test") -> ClusterFiles:
    return files_of(name, {"XDG_STATE_HOME": str(tmp_path)})


def layout_in(tmp_path: Path, **options: object) -> ClusterLayout:
    return make_layout(
        UpOptions(name="test", **options),  # type: ignore[arg-type]
        make_files(tmp_path),
        available_bytes=10 * 10**9,
        cores=8,
    )


def machine(**environ: str) -> Machine:
    return Machine(install=find_triton(), environ=environ, python=Path(sys.executable))


def specs_of(layout: ClusterLayout, **environ: str) -> dict[str, ProcessSpec]:
    ensure_secrets(layout.files)
    waves = process_waves(layout, machine(**environ))
    return {spec.name: spec for wave in waves for spec in wave}


# ---- layout ----


@pytest.mark.parametrize(
    ("of_user", "told"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "store.local"}, "127.0.0.1,localhost,store.local"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_no_proxy_stands_before_the_clusters_own_store(
    tmp_path: Path, of_user: dict[str, str], told: str
) -> None:
    environment = specs_of(layout_in(tmp_path, nodes=1), **of_user)["node1-agent"].environment
    assert environment["no_proxy"] == environment["NO_PROXY"] == told


def test_no_port_is_given_twice_and_channel_ranges_are_disjoint(tmp_path: Path) -> None:
    layout = layout_in(tmp_path, nodes=4)
    ports = [layout.scheduler_port, layout.gateway_grpc_port, layout.gateway_http_port]
    ports.append(layout.s3_port or 0)
    for node in layout.nodes:
        ports += [node.triton_grpc_port, node.triton_http_port, node.triton_metrics_port]
        ports += [node.agent_port, *range(node.channel_port_start, node.channel_port_end)]
    assert len(ports) == len(set(ports))
    assert min(ports) > 0


def test_ports_that_are_given_are_used_and_memory_is_shared_out(tmp_path: Path) -> None:
    layout = layout_in(tmp_path, nodes=2, gateway_http_port=8123, with_s3=False)
    assert layout.gateway_http_port == 8123
    assert layout.s3_url is None
    assert [node.memory_bytes for node in layout.nodes] == [3_500_000_000] * 2


@given(taken=st.sets(st.integers(10_000, 31_999), max_size=50), seed=st.integers(0, 1000))
def test_a_block_of_ports_is_free_and_was_not_given_before(taken: set[int], seed: int) -> None:
    picker = PortPicker(Random(seed), lambda port: port not in taken)
    given_out: set[int] = set()
    for count in (1, 32, 1, 64):
        first = picker.block(count)
        block = set(range(first, first + count))
        assert not block & (taken | given_out)
        given_out |= block


def test_the_port_that_clients_expect_is_taken_once_and_only_if_free() -> None:
    picker = PortPicker(Random(1), lambda port: port != 8000)
    assert picker.one(8001) == 8001
    assert picker.one(8001) != 8001
    assert picker.one(8000) != 8000


def test_a_port_is_free_as_soon_as_its_server_has_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # first: this side keeps the port in TIME_WAIT
            assert client.recv(1) == b""
    assert is_free("127.0.0.1", port)


def test_no_free_port_is_an_error_and_not_a_search_without_end() -> None:
    with pytest.raises(Unavailable, match="No 2 free ports"):
        PortPicker(Random(1), lambda _port: False).block(2)


def test_a_port_in_use_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free("127.0.0.1", port)
    assert is_free("127.0.0.1", port)


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-a", "a" * 33, "a b"])
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be the name of a cluster"):
        check_name(name)


def test_clusters_of_one_name_in_two_places_do_not_share_memory_files(tmp_path: Path) -> None:
    first, second = make_files(tmp_path / "a"), make_files(tmp_path / "b")
    assert first.shm_prefix != second.shm_prefix


_RUNNING_BEFORE = rb"""{
  "layout": {
    "name": "c\u00e9", "host": "127.0.0.1", "scheduler_port": 1, "gateway_grpc_port": 2,
    "gateway_http_port": 3, "s3_port": null,
    "nodes": [
      {
        "name": "node1", "host": "127.0.0.2", "triton_grpc_port": 4, "triton_http_port": 5,
        "triton_metrics_port": 6, "agent_port": 7, "channel_port_start": 8,
        "channel_port_end": 9, "memory_bytes": 10, "nic_bytes_per_s": 11.5,
        "agent_settings": {"disk_dir": "/d", "slots": 1}, "network_namespace": null
      }
    ],
    "state_dir": "/s", "compute_threads": 2, "scheduler_settings": {}
  },
  "supervisor_pid": 12,
  "processes": [{"name": "s3", "pid": 13}]
}"""


def test_what_an_earlier_version_wrote_about_a_running_cluster_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_bytes(_RUNNING_BEFORE)
    node = NodeLayout(
        name="node1",
        host="127.0.0.2",
        triton_grpc_port=4,
        triton_http_port=5,
        triton_metrics_port=6,
        agent_port=7,
        channel_port_start=8,
        channel_port_end=9,
        memory_bytes=10,
        nic_bytes_per_s=11.5,
        agent_settings={"disk_dir": "/d", "slots": 1},
    )
    layout = ClusterLayout(
        name="cé",
        host="127.0.0.1",
        scheduler_port=1,
        gateway_grpc_port=2,
        gateway_http_port=3,
        s3_port=None,
        nodes=(node,),
        state_dir=Path("/s"),
        compute_threads=2,
    )
    assert read_running(path) == RunningCluster(
        layout=layout, supervisor_pid=12, processes=(Process(name="s3", pid=13),)
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"Cannot read .*cluster\.json: No such file or directory\."),
        (b"{}", r"cluster\.json was written by another version: .*`layout`"),
        (
            _RUNNING_BEFORE.replace(b": 12,", b': "12",'),
            "written by another version: .*supervisor_pid",
        ),
        (_RUNNING_BEFORE[:-1], "written by another version"),
    ],
)
def test_a_record_of_another_kind_is_named(
    content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=sentence):
        read_running(path)


def test_what_is_written_about_a_running_cluster_is_read_back(tmp_path: Path) -> None:
    layout = layout_in(tmp_path)
    running = RunningCluster(
        layout=layout, supervisor_pid=7, processes=(Process(name="s3", pid=8),)
    )
    layout.state_dir.mkdir(parents=True)
    write_running(layout.files.cluster, running)
    assert read_running(layout.files.cluster) == running


# ---- processes ----


def test_agents_start_after_the_servers_they_talk_to(tmp_path: Path) -> None:
    layout = layout_in(tmp_path, nodes=2)
    ensure_secrets(layout.files)
    waves = process_waves(layout, machine())
    assert [{spec.name for spec in wave} for wave in waves] == [
        {"s3", "node1-triton", "node2-triton", "scheduler"},
        {"node1-agent", "node2-agent"},
    ]


def test_no_secret_is_in_arguments_or_settings_files(tmp_path: Path) -> None:
    layout = layout_in(tmp_path, nodes=1)
    specs = specs_of(layout)
    write_files(layout, machine())
    key = read_s3_key(layout.files)
    token = layout.files.token.read_text()
    visible = [word for spec in specs.values() for word in spec.command]
    visible += [path.read_text() for path in layout.files.config.iterdir()]
    for secret in (token, key.secret_key, key.access_key):
        assert not any(secret in text for text in visible)
    assert key.secret_key not in repr(key)
    for path in (layout.files.token, layout.files.s3_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    sweep(SHM, layout.files.shm_prefix)


def test_secrets_are_made_once(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    ensure_secrets(files)
    before = (files.token.read_text(), read_s3_key(files).secret_key)
    ensure_secrets(files)
    assert (files.token.read_text(), read_s3_key(files).secret_key) == before


def test_the_users_cloud_credentials_reach_no_process_of_a_cluster_with_its_own_store(
    tmp_path: Path,
) -> None:
    mine = {"AWS_SECRET_ACCESS_KEY": "of-the-user", "AWS_PROFILE": "work", "HOME": "/root"}
    specs = specs_of(layout_in(tmp_path, nodes=1), **mine)
    for spec in specs.values():
        assert spec.environment["HOME"] == "/root"
        assert "of-the-user" not in spec.environment.values()
        assert "AWS_PROFILE" not in spec.environment
    assert specs["node1-agent"].environment["AWS_ENDPOINT_URL_S3"].startswith("http://127.0.0.1:")


def test_without_its_own_store_the_daemons_keep_the_users_credentials(tmp_path: Path) -> None:
    specs = specs_of(layout_in(tmp_path, nodes=1, with_s3=False), AWS_PROFILE="work")
    assert "s3" not in specs
    assert specs["node1-agent"].environment["AWS_PROFILE"] == "work"
    assert "AWS_PROFILE" not in specs["node1-triton"].environment


# ---- children ----


def fake(
    tmp_path: Path, name: str, body: str, is_ready: Callable[[], bool] = lambda: True
) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        command=(sys.executable, "-c", textwrap.dedent(body)),
        environment=dict(os.environ),
        log=tmp_path / f"{name}.log",
        is_ready=is_ready,
    )


def wait_for(path: Path, child: Child) -> None:
    """Block until the child has written to `path`, a pipe."""
    with path.open() as pipe:
        assert pipe.readline(), child.log_tail()


STUBBORN = """
    import signal, sys
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open({pipe!r}, "w").write("up\\n")
    signal.pause()
"""
# Blocked, so that a signal before the wait is not lost.
KIND = """
    import signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    open({pipe!r}, "w").write("up\\n")
    signal.sigwait([signal.SIGTERM])
"""


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = start(fake(tmp_path, "stubborn", STUBBORN.format(pipe=str(pipe))))
    wait_for(pipe, child)
    stop([child], grace_s=0.05)
    assert child.process.returncode == -signal.SIGKILL


def test_a_child_that_ends_on_sigterm_is_not_killed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = start(fake(tmp_path, "kind", KIND.format(pipe=str(pipe))))
    wait_for(pipe, child)
    stop([child], grace_s=HANG_S)
    assert child.process.returncode == 0


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    child = start(fake(tmp_path, "talker", "for i in range(100): print('line', i)"))
    assert child.process.wait(HANG_S) == 0
    lines = child.log_tail().splitlines()
    assert lines[-1].strip() == "line 99"
    assert len(lines) < 20


def test_a_child_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    parent = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from paraserve_scheduler.local.children import ProcessSpec, start
        spec = ProcessSpec(
            name="child",
            command=(sys.executable, "-c", sys.argv[2]),
            environment=dict(os.environ), log=Path(sys.argv[1]), is_ready=lambda: True,
        )
        print(start(spec).process.pid, flush=True)
        time.sleep(1000)
    """)
    child_body = textwrap.dedent(STUBBORN.format(pipe=str(pipe)))
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path / "log"), child_body],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child_pid = int(process.stdout.readline())
    with pipe.open() as up:
        assert up.readline()
    watch = os.pidfd_open(child_pid)
    process.kill()
    process.wait(HANG_S)
    process.stdout.close()
    assert readable_within(watch, HANG_S)  # a pidfd is readable when its process has ended
    os.close(watch)


def readable_within(descriptor: int, timeout_s: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


# ---- lock, signals, leftovers ----


def test_a_lock_has_one_owner_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert owner(path) is None
    with locked(path) as is_mine, locked(path) as is_mine_twice:
        assert (is_mine, is_mine_twice) == (True, False)
        assert owner(path) == os.getpid()
    assert owner(path) is None


def test_signals_wait_for_the_end_of_the_body() -> None:
    done: list[str] = []

    def interrupted() -> None:
        with delayed_signals():
            signal.raise_signal(signal.SIGINT)
            done.append("body")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["body"]


def test_a_sweep_takes_only_what_carries_the_prefix(tmp_path: Path) -> None:
    (tmp_path / "mine-run" / "node1").mkdir(parents=True)
    (tmp_path / "mine-uuid").write_bytes(b"x")
    (tmp_path / "other-uuid").write_bytes(b"x")
    assert sweep(tmp_path, "mine-") == ("mine-run", "mine-uuid")
    assert [path.name for path in tmp_path.iterdir()] == ["other-uuid"]


def test_down_without_a_cluster_does_nothing(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    assert down(files) is False
    assert not files.state_dir.exists()


def test_down_cleans_up_after_a_cluster_whose_supervisor_is_gone(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    files.state_dir.mkdir(parents=True)
    files.cluster.write_text(json.dumps({}))
    region = SHM / f"{files.shm_prefix}node1-left"
    region.write_bytes(b"x")
    assert find(files) is None
    assert down(files, delete=True) is False
    assert not region.exists()
    assert not files.state_dir.exists()
