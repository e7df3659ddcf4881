"""What a Triton user writes today to serve a checkpoint from a store: no ParaServe in it.

Runs inside Triton's Python stub, to which it is copied. How it loads says parameter `loader`;
credentials and endpoint come from the AWS environment of the server.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import triton_python_backend_utils as pb_utils

WEIGHTS = ".safetensors"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        raw = json.loads(args["model_config"])["parameters"]
        parameters = {name: value["string_value"] for name, value in raw.items()}
        self._folder = Path(parameters["folder"])
        self._folder.mkdir(parents=True)
        load = LOADERS[parameters["loader"]]
        self._model = load(parameters["source"], self._folder)
        # As `ignore_eos` of the others: an end of text neither stops it nor is forbidden.
        self._model.generation_config.eos_token_id = None
        self._tokenizer = _transformers().AutoTokenizer.from_pretrained(self._folder)

    def execute(
        self, requests: list[pb_utils.InferenceRequest]
    ) -> list[pb_utils.InferenceResponse]:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        shutil.rmtree(self._folder)

    def _answer(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        prompt = self._tokenizer(given["text_input"][0].decode(), return_tensors="pt")
        count = int(given["max_tokens"][0])
        ids = self._model.generate(**prompt, max_new_tokens=count, do_sample=False)
        new_ids = ids[0, prompt["input_ids"].shape[1] :].numpy().astype(np.int32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("output_ids", new_ids)])


def download_then_load(source: str, folder: Path) -> Any:
    transformers = _transformers()
    _download(source, folder)
    return _from_folder(transformers, folder)


def download_while_importing(source: str, folder: Path) -> Any:
    with ThreadPoolExecutor(1) as thread:
        downloaded = thread.submit(_download, source, folder)
        transformers = _transformers()
        # Else from_pretrained would import it after the download.
        assert transformers.LlamaForCausalLM
        downloaded.result()
    return _from_folder(transformers, folder)


def stream_with_runai(source: str, folder: Path) -> Any:
    """Run:ai's streamer gives the tensors; transformers adopts them without a copy of its own."""
    transformers, runai = _transformers(), import_module("runai_model_streamer")
    weights = _download(source, folder, without=WEIGHTS)
    with runai.SafetensorsStreamer() as streamer:
        streamer.stream_files(weights)
        tensors = dict(streamer.get_tensors())
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, config.architectures[0])
    return architecture.from_pretrained(
        None, config=config, state_dict=tensors, dtype=config.dtype
    ).eval()


LOADERS: Mapping[str, Callable[[str, Path], Any]] = {
    "boto3": download_then_load,
    "boto3-early": download_while_importing,
    "runai": stream_with_runai,
}


def _transformers() -> Any:
    return import_module("transformers")


def _from_folder(transformers: Any, folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def _download(source: str, folder: Path, *, without: str | None = None) -> list[str]:
    """Download all files of a prefix but those that end so; return the URIs of the latter."""
    parts = urlsplit(source)
    client = import_module("boto3").client("s3")
    listed = client.list_objects_v2(Bucket=parts.netloc, Prefix=parts.path.strip("/") + "/")
    left = []
    for key in sorted(entry["Key"] for entry in listed["Contents"]):
        if without is not None and key.endswith(without):
            left.append(f"s3://{parts.netloc}/{key}")
        else:
            client.download_file(parts.netloc, key, str(folder / key.rpartition("/")[2]))
    return left
