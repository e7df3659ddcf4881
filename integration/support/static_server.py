"""nginx with one folder of files, for benchmarks; it ignores what S3 clients sign.

Files are sent by sendfile from the page cache, so that the server costs as little as one can.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from integration.support.limits import HANG_S
from paraserve_backend.errors import NotFound, Unavailable

_CONFIG = """
daemon off;
user root;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    default_type application/octet-stream;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{ listen {host}:{port}; root {root}; }}
}}
"""


def missing_requirement() -> str | None:
    """Return why there is no such server here, or None."""
    if shutil.which("nginx") is None:
        return "nginx is missing: apt-get install nginx-light"
    return None


@contextmanager
def static_server(
    root: Path, folder: Path, host: str, port: int, *, prefix: Sequence[str] = ()
) -> Iterator[None]:
    """Serve `root` over HTTP until the end of the body.

    The calling thread must be in the network of `host`. `prefix` goes before the command line.

    Raises:
        NotFound: there is no nginx on this machine.
        Unavailable: it does not answer.
    """
    nginx = shutil.which("nginx")
    if nginx is None:
        raise NotFound("There is no nginx on this machine: run apt-get install nginx-light.")
    config = folder / "nginx.conf"
    text = _CONFIG.format(folder=folder, host=host, port=port, root=root)
    config.write_text(text, encoding="utf-8")
    process = subprocess.Popen([*prefix, nginx, "-c", str(config), "-p", str(folder)])
    try:
        _wait_for(host, port, process)
        yield
    finally:
        process.terminate()
        process.wait()


def _wait_for(host: str, port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + HANG_S
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise Unavailable(f"nginx does not answer on {host}:{port}.") from None
            time.sleep(0.02)
        else:
            return
