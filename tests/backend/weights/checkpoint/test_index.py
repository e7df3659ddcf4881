from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel
from paraserve_backend.weights.checkpoint.index import CheckpointIndex, read_index
from paraserve_backend.weights.checkpoint.safetensors import ITEM_BYTES
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


@pytest.mark.parametrize("key", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "sentence"), [("{,}", "is not valid JSON"), ("[]", "is not a JSON object")]
)
def test_settings_that_a_start_would_stumble_over_are_refused(
    tmp_path: Path, key: str, content: str, sentence: str
) -> None:
    folder = folder_with(tmp_path, safetensors_file(header_of(SHAPES), DATA))
    (folder / key).write_text(content)
    with pytest.raises(InvalidCheckpoint, match=f"{key} {sentence}"):
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


def rewrite_map(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    fields = json.loads(path.read_text())
    change(fields["weight_map"])
    path.write_text(json.dumps(fields))


def test_a_type_that_we_do_not_know_is_nobodys_fault_yet(tmp_path: Path) -> None:
    index = index_of(folder_with(tmp_path, altered(field("a", "dtype", "F4_NEW"))))
    assert index.tensors["a"].dtype == "F4_NEW"


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda names: names.update(extra="gone.safetensors"), {"extra": "gone.safetensors"}),
        (lambda names: names.update(extra="../secret"), {"extra": "../secret"}),
        (lambda names: names.update(extra=names["lm_head.weight"]), {}),
        (lambda names: names.update(extra=None), {}),
    ],
)
def test_what_a_shard_map_says_of_tensors_that_are_not_there_refuses_nothing(
    model: Path, change: Callable[[dict[str, object]], object], missing: Mapping[str, str]
) -> None:
    before = index_of(model)
    rewrite_map(model, change)
    index = index_of(model)
    assert index.missing == missing
    assert (index.tensors, index.objects) == (before.tensors, before.objects)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda names: names.clear(), "no weight_map"),
        (lambda names: names.update(dict.fromkeys(names)), "no weight_map"),
        (lambda names: names.update(dict.fromkeys(names, "gone")), "names gone, which .* has not"),
    ],
)
def test_a_shard_map_that_leads_to_no_file_is_refused(
    model: Path, change: Callable[[dict[str, object]], object], sentence: str
) -> None:
    rewrite_map(model, change)
    with pytest.raises(InvalidCheckpoint, match=sentence):
        index_of(model)


@pytest.mark.parametrize("at", [0, 1])
def test_of_a_tensor_in_two_shards_that_of_the_shard_map_is_taken(tmp_path: Path, at: int) -> None:
    write_checkpoint(tmp_path, shards=2)
    shards = sorted(shard.name for shard in tmp_path.glob("model-*.safetensors"))
    for seed, shard in enumerate(shards):
        write_shard(tmp_path / shard, SHAPES, seed)
    weight_map = {"a": shards[at], "b": shards[1 - at]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = {name: tensor.object_key for name, tensor in index_of(tmp_path).tensors.items()}
    assert found == weight_map


@pytest.mark.parametrize(
    ("key", "most_bytes"),
    [
        ("config.json", 10**6),
        ("generation_config.json", 10**6),
        ("tokenizer.json", 10**8),
        ("tokenizer_config.json", 10**7),
        ("chat_template.jinja", 10**6),
    ],
)
def test_a_small_file_that_is_not_small_is_refused_unread(
    tmp_path: Path, key: str, most_bytes: int
) -> None:
    folder = folder_with(tmp_path, safetensors_file(header_of(SHAPES), DATA))
    with (folder / key).open("wb") as file:
        file.truncate(most_bytes + 1)
    sentence = f"{key} has {most_bytes + 1} bytes, {most_bytes} at most are allowed"
    with pytest.raises(InvalidCheckpoint, match=sentence):
        index_of(folder)


def test_headers_that_are_long_only_together_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shards = [f"model-{number}.safetensors" for number in range(3)]
    for shard in shards:
        with (tmp_path / shard).open("wb") as file:
            file.write((40_000_000).to_bytes(8, "little"))
            file.truncate(50_000_000)
    weight_map = {shard: shard for shard in shards}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidCheckpoint, match=r"the headers of .* have 120000024 bytes"):
        index_of(tmp_path)


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


@pytest.mark.parametrize(
    "key",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
)
def test_a_small_file_that_git_lfs_has_not_fetched_is_named(tmp_path: Path, key: str) -> None:
    folder = folder_with(tmp_path, safetensors_file(header_of(SHAPES), DATA))
    (folder / key).write_bytes(LFS_POINTER)
    with pytest.raises(InvalidCheckpoint, match=f"{key} is only a git-lfs pointer .*`git lfs pull"):
        index_of(folder)


@pytest.mark.parametrize(
    "key", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_weights_that_git_lfs_has_not_fetched_are_named(model: Path, key: str) -> None:
    assert (model / key).exists()
    (model / key).write_bytes(LFS_POINTER)
    with pytest.raises(InvalidCheckpoint, match=f"{key} is only a git-lfs pointer"):
        index_of(model)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "PEFT adapter .*merge_and_unload"),
        (
            ("adapter_config.json", "adapter_model.safetensors", "config.json"),
            "PEFT adapter .*merge_and_unload",
        ),
        (("llama-7b.Q4_K_M.gguf",), "has its weights as GGUF"),
        (("llama-7b.Q4_K_M.gguf", "config.json", "tokenizer.json"), "has its weights as GGUF"),
    ],
)
def test_folders_of_other_kinds_are_called_by_their_name(
    tmp_path: Path, names: tuple[str, ...], sentence: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedModel, match=sentence):
        index_of(tmp_path)


@pytest.mark.parametrize("extra", ["adapter_config.json", "model.gguf"])
def test_what_else_lies_beside_a_whole_model_disturbs_nobody(tmp_path: Path, extra: str) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / extra).write_text("{}")
    assert index_of(folder).tensors


def test_the_type_of_the_weights_is_that_of_the_first_tensor_by_name(tmp_path: Path) -> None:
    types = {"b": "F32", "a.ids": "I64", "a.scale": "F8_E4M3", "a.x": "BF16"}
    header: Header = {}
    position = 0
    for name, dtype in types.items():
        end = position + ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": [1], "data_offsets": [position, end]}
        position = end
    index = index_of(folder_with(tmp_path, safetensors_file(header, bytes(position))))
    assert index.dtype == "BF16"


def test_a_checkpoint_without_floating_numbers_has_no_type(tmp_path: Path) -> None:
    content = safetensors_file(header_of({"a": (1,)}, "I64"), bytes(8))
    assert index_of(folder_with(tmp_path, content)).dtype == ""
