from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paraserve_backend.agent.config import AgentConfig
from paraserve_backend.agent.hardware import node_info
from paraserve_backend.daemon.settings import load_config
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.machine.devices import find_devices
from paraserve_backend.machine.memory import available_bytes
from paraserve_backend.tritonserver.host.client import read_key

_MEMINFO = "MemTotal:       2048 kB\nMemFree:   10 kB\nMemAvailable:    1000 kB\n"


def make_config() -> AgentConfig:
    return AgentConfig(
        name="node-1",
        scheduler="127.0.0.1:8400",
        triton="127.0.0.1:8001",
        model_repository=Path("/models"),
        run_dir=Path("/dev/shm/run"),
        listen="127.0.0.1:0",
    )


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "meminfo").write_text(_MEMINFO)
    return tmp_path


def test_what_is_not_set_is_what_the_machine_has(machine: Path) -> None:
    info = node_info(make_config(), 4321, proc=machine, dev=machine)
    assert info.agent_address == "127.0.0.1:4321"
    assert info.triton_grpc_address == "127.0.0.1:8001"
    assert info.memory_bytes == int(1000 * 1024 * 0.8)
    assert list(info.devices) == ["cpu"]
    assert info.max_slots == 1


def test_what_is_set_is_told_as_it_is(machine: Path) -> None:
    config = replace(
        make_config(),
        listen="0.0.0.0:8500",
        advertise="node-1.example:9",
        advertise_triton="node-1.example:10",
        memory_bytes=5,
        devices=("cuda:1",),
    )
    info = node_info(config, 8500, proc=machine, dev=machine)
    assert info.agent_address == "node-1.example:9"
    assert info.triton_grpc_address == "node-1.example:10"
    assert (info.memory_bytes, list(info.devices)) == (5, ["cuda:1"])


def test_the_kind_of_hardware_is_the_gpus_model_where_there_is_one(machine: Path) -> None:
    (machine / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    info = node_info(make_config(), 4321, proc=machine, dev=machine)
    assert info.kind == "Some CPU @ 2 GHz"
    gpu = machine / "driver" / "nvidia" / "gpus" / "0000:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 10\n")
    assert node_info(make_config(), 4321, proc=machine, dev=machine).kind == "NVIDIA H200"


def test_listening_everywhere_needs_an_address_for_others(machine: Path) -> None:
    config = replace(make_config(), listen="0.0.0.0:8500")
    with pytest.raises(InvalidRequest, match="set 'advertise'"):
        node_info(config, 8500, proc=machine, dev=machine)


def test_gpus_are_counted_by_their_device_files(machine: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (machine / name).touch()
    assert find_devices(machine) == ("cuda:0", "cuda:1")


def test_a_kernel_without_memavailable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(InvalidRequest, match="set memory_bytes"):
        available_bytes(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("listen", "8500", "'listen' is '8500'; write it as host:port"),
        ("scheduler", "host:", "'scheduler' .* host:port"),
        ("advertise", "host", "'advertise' .* host:port"),
        ("run_dir", "run", "absolute"),
        ("channel_port_end", 18600, "channel_port_start must be below"),
        ("disk_bytes", 1, "disk_bytes needs disk_dir"),
        ("shedule", "x", "did you mean 'scheduler'"),
    ],
)
def test_a_wrong_setting_is_named(key: str, value: object, sentence: str) -> None:
    given: dict[str, object] = {
        "name": "node-1",
        "scheduler": "127.0.0.1:8400",
        "triton": "127.0.0.1:8001",
        "model_repository": "/models",
        "run_dir": "/dev/shm/run",
    }
    with pytest.raises(InvalidRequest, match=sentence):
        load_config(AgentConfig, None, given | {key: value})


def test_a_key_file_must_hold_a_name_and_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("sched-key=SECRET\n")
    assert read_key(path) == "sched-key=SECRET"
    assert read_key(None) is None
    path.write_text("SECRET")
    with pytest.raises(InvalidRequest, match="must hold name=secret") as caught:
        read_key(path)
    assert "SECRET" not in str(caught.value)
    with pytest.raises(InvalidRequest, match="Cannot read triton_key_file"):
        read_key(tmp_path / "none")
