from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import grpc.aio
import pytest

from paraserve_backend.daemon.settings import load_config
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.auth import metadata
from paraserve_backend.rpc.paraserve_pb2_grpc import SchedulerStub
from paraserve_scheduler.control_plane.config import SchedulerConfig
from paraserve_scheduler.control_plane.main import main, run
from tests.support.limits import HANG_S
from tests.support.ports import free_ports


async def test_the_process_serves_and_leaves_its_state_for_the_next(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("s3cret\n")
    config = SchedulerConfig(
        listen=f"127.0.0.1:{free_ports(1)[0]}",
        state_file=tmp_path / "state.db",
        token_file=token_file,
        with_gateway=False,
    )

    async def once() -> None:
        process = asyncio.create_task(run(config))
        async with grpc.aio.insecure_channel(config.listen) as channel:
            reply = await SchedulerStub(channel).Status(
                pb.StatusRequest(), metadata=metadata("s3cret"), wait_for_ready=True, timeout=HANG_S
            )
            assert list(reply.nodes) == []
        process.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await process

    await once()
    await once()


async def test_an_open_address_needs_a_token(tmp_path: Path) -> None:
    config = SchedulerConfig(listen="0.0.0.0:0", state_file=tmp_path / "state.db")
    with pytest.raises(InvalidRequest, match="without a cluster token"):
        await run(config)


async def test_a_taken_address_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        config = SchedulerConfig(listen=address, state_file=tmp_path / "state.db")
        with pytest.raises(InvalidRequest, match=f"Cannot listen on {address}"):
            await run(config)


def test_a_gateway_that_cannot_listen_ends_the_scheduler_with_its_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        settings = tmp_path / "scheduler.yaml"
        settings.write_text(
            f"listen: 127.0.0.1:0\nstate_file: {tmp_path / 'state.db'}\n"
            f"gateway:\n  scheduler_address: 127.0.0.1:1\n  grpc_address: {address}\n"
        )
        with pytest.raises(InvalidRequest, match=f"Cannot listen on grpc_address {address}"):
            main(["--config", str(settings)])


def test_settings_come_from_yaml_with_nested_sections(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.yaml"
    path.write_text(
        "listen: 127.0.0.1:9\npolicy:\n  drain_grace_s: 5\n  placement:\n    kv_share: 0.25\n"
    )
    config = load_config(SchedulerConfig, path)
    assert config.policy.drain_grace_s == 5.0
    assert config.policy.placement.kv_share == 0.25
    path.write_text("policy:\n  drain_grace: 5\n")
    with pytest.raises(InvalidRequest, match=r"did you mean 'policy.drain_grace_s'"):
        load_config(SchedulerConfig, path)
