"""Finds Triton on this machine, and how to start it so that its Python stub finds this package.

It knows the `nvidia-pytriton` wheel and a host or container installation (usually
/opt/tritonserver). The options that every tritonserver needs are here. It starts nothing.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.errors import NotFound

HOST_INSTALL = Path("/opt/tritonserver")
STUB_NAME = "triton_python_backend_stub"
#: The whole backend: Triton imports this file, the installed package does the rest.
MODEL_PY = "from paraserve_backend.tritonserver.stub.model import TritonPythonModel\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonInstall:
    server: Path
    #: Holds libtriton_python.so and triton_python_backend_utils.py.
    python_backend_dir: Path
    stub: Path
    #: What LD_LIBRARY_PATH needs; without libpython there a model load hangs.
    library_path: tuple[Path, ...]
    #: Folder whose `python3` the stub takes its packages from: first on PATH.
    python_path_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """One tritonserver of ours."""

    model_repository: Path
    backend_directory: Path
    host: str
    grpc_port: int
    http_port: int
    metrics_port: int
    #: Names of the server's files in /dev/shm start with it, so leftovers can be found.
    shm_prefix: str


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def find_triton(home: Path | None = None) -> TritonInstall:
    """Find a Triton whose Python stub is built for this interpreter.

    Args:
        home: a host install; without it the wheel is tried first, then /opt/tritonserver.

    Raises:
        NotFound: server, stub or libpython is missing; says how to get it.
    """
    if home is not None:
        return _host_install(home)
    wheel = _wheel_folder()
    if wheel is not None:
        return _wheel_install(wheel)
    if (HOST_INSTALL / "bin" / "tritonserver").exists():
        return _host_install(HOST_INSTALL)
    raise NotFound(
        f"No Triton server found, neither the nvidia-pytriton package nor {HOST_INSTALL}: "
        "run pip install 'paraserve[local]'."
    )


def find_libpython() -> Path:
    """Return the folder that holds this Python's shared library.

    Raises:
        NotFound: it is not on this machine.
    """
    name = f"libpython{python_version()}.so.1.0"
    for folder in _library_folders():
        if (folder / name).exists():
            return folder
    raise NotFound(
        f"Triton's Python stub needs {name}, which is not on this machine: "
        f"run apt-get install libpython{python_version()}."
    )


def prepare_backend_directory(directory: Path, install: TritonInstall) -> None:
    """Fill `directory` for --backend-directory: Triton's python backend and ours beside it."""
    python = directory / "python"
    python.mkdir(parents=True, exist_ok=True)
    # Copies: Triton refuses a backend library whose link leads out of its folder.
    for file in (*install.python_backend_dir.iterdir(), install.stub):
        if file.is_file():
            _copy(file, python / file.name)
    write_backend(directory)


def write_backend(directory: Path) -> Path:
    """Write backend `paraserve` below a backend directory and return its model.py."""
    model = directory / "paraserve" / "model.py"
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_text(MODEL_PY, encoding="utf-8")
    return model


def launch_command(install: TritonInstall, options: ServerOptions) -> list[str]:
    return [
        str(install.server),
        f"--model-repository={options.model_repository}",
        f"--http-address={options.host}",
        f"--http-port={options.http_port}",
        f"--grpc-address={options.host}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-address={options.host}",
        f"--metrics-port={options.metrics_port}",
        *required_options(options.backend_directory),
        f"--backend-config=python,shm-region-prefix-name={options.shm_prefix}",
    ]


def required_options(backend_directory: Path) -> list[str]:
    """Return the options any tritonserver needs for ParaServe, with the reason for each."""
    return [
        f"--backend-directory={backend_directory}",
        "--model-control-mode=explicit",  # the agent alone loads and unloads
        "--disable-auto-complete-config",  # 0.1 s a load instead of 1.3 s
        "--strict-readiness=false",  # a loading model must not take the server out of rotation
        "--model-load-thread-count=8",
        "--exit-timeout-secs=5",
    ]


def launch_environment(install: TritonInstall, environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with what server and stub need to find libraries and packages."""
    libraries = [str(folder) for folder in install.library_path]
    return dict(environ) | {
        "PATH": _joined([str(install.python_path_dir)], environ.get("PATH", "")),
        "LD_LIBRARY_PATH": _joined(libraries, environ.get("LD_LIBRARY_PATH", "")),
    }


def _wheel_folder() -> Path | None:
    """Return site-packages of nvidia-pytriton without importing it; importing has side effects."""
    try:
        distribution = importlib.metadata.distribution("nvidia-pytriton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(""))).resolve()


def _wheel_install(site_packages: Path) -> TritonInstall:
    triton = site_packages / "pytriton" / "tritonserver"
    stub = triton / "python_backend_stubs" / python_version() / STUB_NAME
    if not stub.exists():
        available = sorted(path.name for path in (triton / "python_backend_stubs").glob("3.*"))
        raise NotFound(
            f"The nvidia-pytriton package has no stub for Python {python_version()}, only for "
            f"{', '.join(available)}: make the environment with one of these."
        )
    return TritonInstall(
        server=triton / "bin" / "tritonserver",
        python_backend_dir=triton / "backends" / "python",
        stub=stub,
        library_path=(site_packages / "nvidia_pytriton.libs", find_libpython()),
        python_path_dir=Path(sys.executable).parent,
    )


def _host_install(home: Path) -> TritonInstall:
    server = home / "bin" / "tritonserver"
    python = home / "backends" / "python"
    for needed in (server, python / "libtriton_python.so", python / STUB_NAME):
        if not needed.exists():
            raise NotFound(f"{home} is not a Triton install with a Python backend: no {needed}.")
    _require_same_python(python / STUB_NAME)
    return TritonInstall(
        server=server,
        python_backend_dir=python,
        stub=python / STUB_NAME,
        library_path=(home / "lib", find_libpython()),
        python_path_dir=Path(sys.executable).parent,
    )


def stub_python_version(stub: Path) -> str | None:
    """Return the Python version a stub is linked to, e.g. "3.11", or None if it cannot be told."""
    found = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes())
    return found.group(1).decode() if found else None


def _require_same_python(stub: Path) -> None:
    built_for = stub_python_version(stub)
    if built_for != python_version():
        raise NotFound(
            f"{stub} is built for Python {built_for or 'of an unknown version'}, not for "
            f"{python_version()}: install paraserve with that Python, or build the stub for this."
        )


def _library_folders() -> Iterator[Path]:
    # First this interpreter's own: another build of the same version may differ in its options.
    configured = sysconfig.get_config_var("LIBDIR")
    if configured:
        yield Path(configured)
    yield Path(sys.base_prefix) / "lib"
    multiarch = sysconfig.get_config_var("MULTIARCH")
    if multiarch:
        yield Path("/usr/lib") / multiarch
    yield from (Path("/usr/lib64"), Path("/usr/lib"), Path("/usr/local/lib"))


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # overwriting a stub that runs would fail
    shutil.copy2(source, target)


def _joined(first: list[str], rest: str) -> str:
    return ":".join([*first, *([rest] if rest else [])])
