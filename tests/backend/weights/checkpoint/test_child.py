from __future__ import annotations

import json
import resource
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paraserve_backend.errors import (
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
    SourceUnavailable,
    UnsupportedModel,
)
from paraserve_backend.weights.checkpoint.child import ReadLimits, read_apart
from paraserve_backend.weights.checkpoint.model import read_model
from paraserve_backend.weights.sources.open import open_source
from tests.support.checkpoints import safetensors_file, write_shard
from tests.support.limits import HANG_S
from tests.support.scheduler_records import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_child_reads_what_this_process_would(folder: Path) -> None:
    assert read_apart(str(folder)).index == read_model(open_source(str(folder)))


def test_a_hundred_shards_fit_into_a_fraction_of_the_limits(folder: Path) -> None:
    index = read_model(open_source(str(folder)))
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(index.tensors.items()):
        shapes = {f"extra.{number}.{extra}": (1,) for extra in range(500)}
        write_shard(folder / f"model-{number}.safetensors", {name: tensor.shape, **shapes})
        weight_map[name] = f"model-{number}.safetensors"
    for number in range(len(weight_map), 100):
        write_shard(folder / f"model-{number}.safetensors", {f"extra.{number}": (1,)})
        weight_map[f"extra.{number}"] = f"model-{number}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = read_apart(str(folder), limits=ReadLimits(memory_bytes=512 << 20, cpu_s=30)).index
    assert found.tensors.keys() == index.tensors.keys()
    assert len(found.objects) == len(index.tensors)


@pytest.mark.parametrize(
    ("spoil", "error", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), InvalidCheckpoint, r"no config\.json"),
        (
            lambda folder: change_config(folder, architectures=["Mystery"]),
            UnsupportedModel,
            "Mystery",
        ),
        (
            lambda folder: change_config(folder, architectures=["\ud800"]),
            UnsupportedModel,
            "\ud800",
        ),
        (shutil.rmtree, NotFound, "model"),
    ],
)
def test_a_childs_error_is_this_processs(
    folder: Path, spoil: Callable[[Path], object], error: type[Exception], sentence: str
) -> None:
    spoil(folder)
    with pytest.raises(error, match=sentence) as caught:
        read_apart(str(folder))
    assert type(caught.value) is error


def test_a_source_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="nowhere"):
        read_apart("ftp://nowhere/model")


def test_267_bytes_of_config_cost_nothing(folder: Path) -> None:
    change_config(folder, num_hidden_layers=10**8)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(InvalidCheckpoint, match=r"'num_hidden_layers' is 100000000.* up to 1000"):
        read_apart(str(folder), limits=ReadLimits(memory_bytes=512 << 20, cpu_s=20))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 10


def test_json_that_needs_more_memory_than_allowed_is_refused(folder: Path) -> None:
    # 20 million lists: 80 MB of text, more than a gigabyte as objects.
    header = b'{"a":[' + b"[]," * 20_000_000 + b"0]}"
    (folder / "model.safetensors").write_bytes(safetensors_file(header, b""))
    limits = ReadLimits(memory_bytes=700 << 20)
    with pytest.raises(InvalidCheckpoint, match="takes more than 700 MiB of memory to read"):
        read_apart(str(folder), limits=limits)


def test_json_that_takes_longer_than_allowed_is_refused(folder: Path) -> None:
    names = ",".join(f'"{number}":[[[[[0]]]]]' for number in range(2_000_000))
    header = b"{" + names.encode() + b"}"
    (folder / "model.safetensors").write_bytes(safetensors_file(header, b""))
    with pytest.raises(InvalidCheckpoint, match="takes more than 1 s of computing, or more"):
        read_apart(str(folder), limits=ReadLimits(cpu_s=1))


@contextmanager
def silent_store() -> Iterator[str]:
    """A store that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        host, port = server.getsockname()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(HANG_S)
            for connection in accepted:
                connection.close()


@pytest.mark.usefixtures("aws_environment")
def test_a_store_that_does_not_answer_ends_with_the_time() -> None:
    with (
        silent_store() as endpoint_url,
        pytest.raises(SourceUnavailable, match="could not be read within 2 s"),
    ):
        read_apart("s3://bucket/model", endpoint_url=endpoint_url, limits=ReadLimits(wall_s=2))


def test_what_lies_in_the_working_directory_is_no_module(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "msgspec", "paraserve_backend"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert read_apart(str(folder)).index.tensors
