from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel
from paraserve_backend.weights.checkpoint.index import CheckpointIndex, read_index
from paraserve_backend.weights.sources.open import open_source
from tests.support.checkpoints import (
    Header,
    header_of,
    safetensors_file,
    tensor_bytes,
    tensor_shapes,
    write_checkpoint,
    write_shard,
)

SHAPES = {"a": (2, 3), "b": (4,)}
DATA = bytes(range(40))


def index_of(folder: Path) -> CheckpointIndex:
    return read_index(open_source(str(folder)))


def folder_with(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("shards", [1, 3])
def test_index_has_every_tensor_with_its_bytes_place(tmp_path: Path, shards: int) -> None:
    index = index_of(write_checkpoint(tmp_path, shards=shards))
    assert {name: tensor.shape for name, tensor in index.tensors.items()} == tensor_shapes()
    assert {tensor.dtype for tensor in index.tensors.values()} == {"F32"}
    assert len(index.objects) == shards
    assert index.config == {"num_hidden_layers": 4}
    assert [stored.key for stored in index.files] == ["config.json", "tokenizer.json"]
    headers_bytes = sum(
        8 + int.from_bytes((tmp_path / stored.key).read_bytes()[:8], "little")
        for stored in index.objects
    )
    assert index.size_bytes == sum(stored.size_bytes for stored in index.objects) - headers_bytes


def test_index_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    folder = write_checkpoint(tmp_path)
    theirs = safetensors_numpy.load_file(folder / "model.safetensors")
    index = index_of(folder)
    assert index.tensors.keys() == theirs.keys()
    for name, tensor in index.tensors.items():
        assert tensor_bytes(folder, tensor) == theirs[name].tobytes()


def test_index_survives_json(model: Path) -> None:
    index = index_of(model)
    assert CheckpointIndex.from_json(index.to_json()) == index


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"tensors": [[1]]}'])
def test_json_of_something_else_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidCheckpoint, match="deploy the model again"):
        CheckpointIndex.from_json(text)


def test_a_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"tensor.{number}": (1,) for number in range(5000)}
    (tmp_path / "config.json").write_text("{}")
    write_shard(tmp_path / "model.safetensors", shapes)
    index = index_of(tmp_path)
    assert {name: tensor.shape for name, tensor in index.tensors.items()} == shapes


def test_a_single_file_is_preferred_over_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    write_checkpoint(tmp_path, shards=1)
    assert [stored.key for stored in index_of(tmp_path).objects] == ["model.safetensors"]


def test_a_tensor_without_elements_is_allowed(tmp_path: Path) -> None:
    index = index_of(folder_with(tmp_path, safetensors_file(header_of({"a": (0, 3)}), b"")))
    assert index.tensors["a"].size_bytes == 0


def altered(change: Callable[[Header], None]) -> bytes:
    header = header_of(SHAPES)
    change(header)
    return safetensors_file(header, DATA)


def field(name: str, key: str, value: object) -> Callable[[Header], None]:
    return lambda header: header[name].update({key: value})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a safetensors file"),
        (b"\x80\x02" * 8, r"not a safetensors file \(its header would be \d+ bytes"),
        ((999).to_bytes(8, "little") + b"{}", "cut off"),
        (safetensors_file(b"{ nonsense", DATA), "header of model.safetensors is not valid"),
        (safetensors_file(b"[" * 100_000, DATA), "header of model.safetensors is not valid"),
        (safetensors_file(b'{"a":{},"a":{}}', DATA), "a name appears twice"),
        (safetensors_file(b"[]", DATA), "not a JSON object"),
        (safetensors_file(header_of(SHAPES), DATA[:-1]), "cut off: "),
        (safetensors_file(header_of(SHAPES), DATA + b"x"), "1 bytes that belong to no tensor"),
        (altered(field("a", "dtype", "F13")), "tensor a .* unknown data type F13"),
        (altered(field("a", "dtype", 4)), "describes tensor a wrongly"),
        (altered(field("a", "shape", [2, -3])), "describes tensor a wrongly"),
        (altered(field("a", "shape", [True, 6])), "describes tensor a wrongly"),
        (altered(field("a", "shape", [2**63, 1])), "describes tensor a wrongly"),
        (altered(field("a", "shape", [10**4000] * 2)), "describes tensor a wrongly"),
        (altered(field("a", "shape", [1] * 65)), "describes tensor a wrongly"),
        (altered(field("a", "shape", [2, 4])), "tensor a .* 24 bytes, .* needs 32"),
        (altered(field("b", "data_offsets", [20, 36])), "tensor b .* overlaps"),
        (altered(field("b", "data_offsets", [28, 44])), "tensor b .* gap"),
        (altered(field("b", "data_offsets", [40, 24])), "tensor b .* -16 bytes"),
        (altered(field("b", "data_offsets", [24])), "describes tensor b wrongly"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=sentence):
        index_of(folder_with(tmp_path, content))


def test_a_name_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    header = header_of({"\ud800": (1,)})
    with pytest.raises(InvalidCheckpoint, match="a name that is not valid Unicode"):
        index_of(folder_with(tmp_path, safetensors_file(header, bytes(4))))


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", SHAPES)
    with pytest.raises(InvalidCheckpoint, match=r"no config\.json"):
        index_of(tmp_path)


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, b"")
    (folder / "config.json").write_text("{,}")
    with pytest.raises(InvalidCheckpoint, match=r"config\.json is not valid JSON"):
        index_of(folder)


def test_a_configuration_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, b"")
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(InvalidCheckpoint, match=r"config\.json has 1000000000000 bytes"):
        index_of(folder)


def test_a_folder_of_pickled_weights_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="convert it to safetensors"):
        index_of(tmp_path)


def rewrite_map(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    fields = json.loads(path.read_text())
    change(fields["weight_map"])
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda names: names.update(extra="gone.safetensors"), "gone.safetensors"),
        (lambda names: names.update(extra="../secret"), "secret"),
        (lambda names: names.update(extra=names["lm_head.weight"]), "tensor extra"),
        (lambda names: names.clear(), "no weight_map"),
    ],
)
def test_a_shard_map_that_does_not_fit_the_shards_is_refused(
    model: Path, change: Callable[[dict[str, str]], object], sentence: str
) -> None:
    rewrite_map(model, change)
    with pytest.raises(InvalidCheckpoint, match=sentence):
        index_of(model)


def test_a_tensor_in_two_shards_is_refused(model: Path) -> None:
    first, second = sorted(model.glob("model-*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(InvalidCheckpoint, match="is both in"):
        index_of(model)
