"""A tritonserver on one node as anyone runs it: no agent, no scheduler, no gateway.

Its models load when they are asked to and are asked at once: what they take from the load call to
the first token is what a cold start takes without ParaServe.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import tritonclient.grpc as triton

from integration.support.limits import HANG_S
from integration.support.memory import model_processes_peak_bytes
from paraserve_backend.errors import DeadlineExceeded, Unavailable
from paraserve_backend.tritonserver.host.install import (
    ServerOptions,
    TritonInstall,
    find_triton,
    launch_command,
    launch_environment,
)
from paraserve_scheduler.client.generate import stream
from paraserve_scheduler.local.layout import (
    SHM,
    ClusterLayout,
    NodeLayout,
    read_s3_key,
)
from paraserve_scheduler.local.processes import aws_environment, http_check

REPOSITORY = Path(__file__).resolve().parents[2]
_MODEL_PY = Path(__file__).with_name("status_quo_model.py")
_STANDALONE = REPOSITORY / "model_repository_templates" / "standalone.pbtxt"
#: The node's own server has 8000 and the next.
_HTTP_PORT, _GRPC_PORT, _METRICS_PORT = 7000, 7001, 7002
_POLL_S = 0.02
#: Requests to the loaded model; the quickest counts, since it is a limit that they tell.
WARM_REQUESTS = 2


class Loader(StrEnum):
    """How the weights get into memory; all but the last are those of status_quo_model."""

    BOTO3 = "boto3"
    BOTO3_EARLY = "boto3-early"
    RUNAI = "runai"
    #: Our backend, with nothing else of ours: it reads its weights itself.
    STANDALONE = "standalone"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainStart:
    ttft_s: float
    #: The same request to the loaded model, the quickest.
    warm_ttft_s: float
    token_ids: tuple[int, ...]
    #: Of the largest model process.
    peak_bytes: int


class PlainTriton:
    """Runs in the network of `node` until the end of a `with`; the caller must be in the hub's."""

    def __init__(self, layout: ClusterLayout, node: NodeLayout) -> None:
        self._layout = layout
        self._node = node
        self._address = f"{node.host}:{_GRPC_PORT}"
        self._models = layout.files.state_dir / "plain" / "models"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._models.mkdir(parents=True)
        install = find_triton()
        with (self._layout.files.logs / "plain-triton.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(install), env=self._environment(install), stdout=log, stderr=log
            )
        is_ready = http_check(f"http://{self._node.host}:{_HTTP_PORT}/v2/health/ready")
        deadline_s = time.monotonic() + HANG_S
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self._stop()
                raise Unavailable(f"The plain tritonserver on {self._node.name} did not start.")
            time.sleep(_POLL_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def start(self, loader: Loader, source: str, prompt: str, max_tokens: int) -> PlainStart:
        """Load a model that nothing is there of, ask it, and unload it."""
        name = f"plain-{loader}"
        self._write(name, loader, source)
        client = triton.InferenceServerClient(self._address)
        try:
            began_s = time.monotonic()
            client.load_model(name)
            self._ask(client, loader, name, prompt, 1)
            ttft_s = time.monotonic() - began_s
            warm_ttft_s = min(
                self._timed_s(client, loader, name, prompt) for _ in range(WARM_REQUESTS)
            )
            token_ids = self._ask(client, loader, name, prompt, max_tokens)
            peak_bytes = model_processes_peak_bytes([self._node])
            client.unload_model(name)
            self._wait_until_unloaded(client, name)
        finally:
            client.close()
        shutil.rmtree(self._models / name)
        return PlainStart(
            ttft_s=ttft_s, warm_ttft_s=warm_ttft_s, token_ids=token_ids, peak_bytes=peak_bytes
        )

    def _command(self, install: TritonInstall) -> list[str]:
        files = self._layout.files
        options = ServerOptions(
            model_repository=self._models,
            backend_directory=files.backend_directory,
            host=self._node.host,
            grpc_port=_GRPC_PORT,
            http_port=_HTTP_PORT,
            metrics_port=_METRICS_PORT,
            shm_prefix=files.triton_shm_prefix("plain"),
        )
        assert self._node.network_namespace is not None
        inside = ["ip", "netns", "exec", self._node.network_namespace]
        return inside + launch_command(install, options)

    def _environment(self, install: TritonInstall) -> dict[str, str]:
        aws = aws_environment(self._layout, read_s3_key(self._layout.files))
        more = {
            # Run:ai's streamer knows this one only, and addresses buckets by host name unless told.
            "AWS_ENDPOINT_URL": aws["AWS_ENDPOINT_URL_S3"],
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": self._layout.host,
            "no_proxy": self._layout.host,
            "OMP_NUM_THREADS": str(self._layout.compute_threads),
        }
        return launch_environment(install, os.environ) | aws | more

    def _write(self, name: str, loader: Loader, source: str) -> None:
        version = self._models / name / "1"
        version.mkdir(parents=True)
        if loader is Loader.STANDALONE:
            config = _standalone_config(source, self._layout.s3_url or "")
        else:
            shutil.copyfile(_MODEL_PY, version / "model.py")
            config = _config(loader, source, SHM / f"{self._layout.files.shm_prefix}plain")
        (self._models / name / "config.pbtxt").write_text(config, encoding="utf-8")

    def _timed_s(
        self, client: triton.InferenceServerClient, loader: Loader, name: str, prompt: str
    ) -> float:
        began_s = time.monotonic()
        self._ask(client, loader, name, prompt, 1)
        return time.monotonic() - began_s

    def _ask(
        self,
        client: triton.InferenceServerClient,
        loader: Loader,
        name: str,
        prompt: str,
        max_tokens: int,
    ) -> tuple[int, ...]:
        if loader is Loader.STANDALONE:
            settings = {"max_tokens": max_tokens, "ignore_eos": True}
            pieces = stream(self._address, name, prompt, settings, timeout_s=HANG_S)
            return tuple(token for piece in pieces for token in piece.token_ids)
        text = triton.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([prompt.encode()], np.object_))
        count = triton.InferInput("max_tokens", [1], "INT32")
        count.set_data_from_numpy(np.array([max_tokens], np.int32))
        ids = client.infer(name, [text, count]).as_numpy("output_ids")
        assert ids is not None
        return tuple(ids.tolist())

    def _wait_until_unloaded(self, client: triton.InferenceServerClient, name: str) -> None:
        """An unload returns before the model's process and its memory are gone."""
        deadline_s = time.monotonic() + HANG_S
        while client.is_model_ready(name) or model_processes_peak_bytes([self._node], name):
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"Model {name} did not unload.")
            time.sleep(_POLL_S)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(HANG_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._models.parent)


def _config(loader: Loader, source: str, folder: Path) -> str:
    parameters = {"loader": loader.value, "source": source, "folder": str(folder)}
    declared = "\n".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        for key, value in parameters.items()
    )
    return f"""
        backend: "python" max_batch_size: 0
        input [ {{ name: "text_input" data_type: TYPE_STRING dims: [1] }},
                {{ name: "max_tokens" data_type: TYPE_INT32 dims: [1] }} ]
        output [ {{ name: "output_ids" data_type: TYPE_INT32 dims: [-1] }} ]
        instance_group [ {{ kind: KIND_CPU count: 1 }} ]
        {declared}
    """


def _standalone_config(source: str, endpoint_url: str) -> str:
    endpoint = f'parameters {{ key: "endpoint_url" value {{ string_value: "{endpoint_url}" }} }}'
    context = 'parameters { key: "max_context" value { string_value: "512" } }'
    template = _STANDALONE.read_text(encoding="utf-8").replace("/models/llama", source)
    return f"{template}\n{endpoint}\n{context}\n"
