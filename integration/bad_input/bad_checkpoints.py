"""Ways to spoil a good checkpoint folder (one file of tied Qwen 2), and what a deploy then says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from integration.support.refusals import Refusal
from paraserve_backend.architectures.registry import FAMILIES
from paraserve_backend.errors import InvalidCheckpoint, UnsupportedModel

SHARD = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NORM = "model.norm.weight"
_UP = "model.layers.3.mlp.up_proj.weight"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
_DOWN = "model.layers.0.mlp.down_proj.weight"

Header = dict[str, dict[str, Any]]
#: Spoils a folder; returns the numbers that the answer names.
Spoil = Callable[[Path], Mapping[str, object] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadCheckpoint(Refusal):
    spoil: Spoil


def header(change: Callable[[Header], None]) -> Spoil:
    """Change what the header says about tensors; their bytes stay."""

    def spoil(folder: Path) -> None:
        fields, data = read_shard(folder)
        change(fields)
        write_shard(folder, json.dumps(fields).encode(), data)

    return spoil


def read_shard(folder: Path) -> tuple[Header, bytes]:
    content = (folder / SHARD).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    fields: Header = json.loads(content[8:end])
    fields.pop("__metadata__", None)
    return fields, content[end:]


def write_shard(folder: Path, text: bytes, data: bytes) -> None:
    """Write a file whose header is `text`."""
    (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data)


def claims(header_bytes: int) -> Spoil:
    """Leave a file of two bytes and what its header claims to have."""
    return file(SHARD, header_bytes.to_bytes(8, "little") + b"{}")


def tensor(name: str, **fields: object) -> Spoil:
    return header(lambda tensors: tensors[name].update(fields))


def config(**fields: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def file(name: str, content: bytes | None) -> Spoil:
    """Replace a file, or remove it."""

    def spoil(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return spoil


def _overlap(tensors: Header) -> None:
    first, second = sorted(tensors.values(), key=lambda each: int(each["data_offsets"][0]))[:2]
    start, end = second["data_offsets"]
    second["data_offsets"] = [start - 4, end - 4]
    assert first["data_offsets"][1] == start


def _gap(tensors: Header) -> None:
    for each in tensors.values():
        each["data_offsets"] = [offset + 4 for offset in each["data_offsets"]]


def _beyond_the_end(folder: Path) -> Mapping[str, object]:
    tensors, data = read_shard(folder)
    last = max(tensors.values(), key=lambda each: int(each["data_offsets"][1]))
    row_bytes = 4 * prod(last["shape"][1:])
    last["shape"][0] += 1
    last["data_offsets"][1] += row_bytes
    write_shard(folder, json.dumps(tensors).encode(), data)
    size = (folder / SHARD).stat().st_size
    return {"size": size, "needed": size + row_bytes}


def _cut_off(folder: Path) -> Mapping[str, object]:
    path = folder / SHARD
    size = path.stat().st_size
    with path.open("r+b") as shard:
        shard.truncate(size - 1000)
    return {"size": size - 1000, "needed": size}


def _unowned_bytes(folder: Path) -> None:
    with (folder / SHARD).open("ab") as shard:
        shard.write(bytes(16))


def _renamed(tensors: Header) -> None:
    tensors["model.layers.3.mlp.upproj.weight"] = tensors.pop(_UP)


def _only(*names: str) -> Spoil:
    """Leave nothing but empty files of these names."""

    def spoil(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).write_text("{}")

    return spoil


def _huge_tokenizer(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(100_000_001)


def _sharded(change: Callable[[dict[str, str]], object]) -> Spoil:
    """Make the one file the only shard of a shard map, and change the map."""

    def spoil(folder: Path) -> None:
        tensors, _ = read_shard(folder)
        (folder / SHARD).rename(folder / "model-1.safetensors")
        weight_map = dict.fromkeys(tensors, "model-1.safetensors")
        change(weight_map)
        (folder / _INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def _missing_shard(folder: Path) -> None:
    """Leave a needed tensor to a shard that is not there."""
    header(lambda tensors: tensors.update(extra=tensors.pop(_NORM)))(folder)
    _sharded(lambda names: names.update({_NORM: "model-2.safetensors"}))(folder)


CHECKPOINTS = (
    BadCheckpoint(
        what="two tensors overlap",
        says="tensor model.layers.0.input_layernorm.weight in model.safetensors overlaps another "
        "tensor",
        error=InvalidCheckpoint,
        spoil=header(_overlap),
    ),
    BadCheckpoint(
        what="bytes that no tensor owns lie between tensors",
        says="tensor model.embed_tokens.weight in model.safetensors leaves a gap before it",
        error=InvalidCheckpoint,
        spoil=header(_gap),
    ),
    BadCheckpoint(
        what="a tensor lies beyond the end of its file",
        says="model.safetensors is cut off: {size} bytes of {needed}, upload it again",
        error=InvalidCheckpoint,
        spoil=_beyond_the_end,
    ),
    BadCheckpoint(
        what="an upload that broke off",
        says="model.safetensors is cut off: {size} bytes of {needed}, upload it again",
        error=InvalidCheckpoint,
        spoil=_cut_off,
    ),
    BadCheckpoint(
        what="a file that is longer than its tensors",
        says="model.safetensors has 16 bytes that belong to no tensor",
        error=InvalidCheckpoint,
        spoil=_unowned_bytes,
    ),
    BadCheckpoint(
        what="a data type that does not exist",
        says="The tensor 'model.norm.weight' has data type F13; weights are stored as one of "
        "F32, BF16, F16.",
        error=InvalidCheckpoint,
        spoil=tensor(_NORM, dtype="F13"),
    ),
    BadCheckpoint(
        what="a data type that is not for weights",
        says="The tensor 'model.norm.weight' has data type I32; weights are stored as one of "
        "F32, BF16, F16.",
        error=InvalidCheckpoint,
        spoil=tensor(_NORM, dtype="I32"),
    ),
    BadCheckpoint(
        what="a shape that does not fit the tensor's bytes",
        says="tensor model.norm.weight in model.safetensors has 192 bytes, its shape [49] of F32 "
        "needs 196",
        error=InvalidCheckpoint,
        spoil=tensor(_NORM, shape=[49]),
    ),
    BadCheckpoint(
        what="a shape of negative or absurd numbers",
        says="the header of model.safetensors describes tensor model.norm.weight wrongly",
        error=InvalidCheckpoint,
        spoil=tensor(_NORM, shape=[10**4000, 10**4000]),
    ),
    BadCheckpoint(
        what="a header longer than its file",
        says="model.safetensors is cut off: its header alone should be 99999999 bytes, "
        "upload it again",
        error=InvalidCheckpoint,
        spoil=claims(99_999_999),
    ),
    BadCheckpoint(
        what="an absurdly large header",
        says="model.safetensors is not a safetensors file (its header would be "
        f"{2**63} bytes, 100000000 at most are allowed), replace it",
        error=InvalidCheckpoint,
        spoil=claims(2**63),
    ),
    BadCheckpoint(
        what="a header that is not JSON",
        says="the header of model.safetensors is not valid: Expecting value: line 1 column 1 "
        "(char 0)",
        error=InvalidCheckpoint,
        spoil=lambda folder: write_shard(folder, b"nonsense", b""),
    ),
    BadCheckpoint(
        what="an empty weights file",
        says="model.safetensors is not a safetensors file, replace it",
        error=InvalidCheckpoint,
        spoil=file(SHARD, b""),
    ),
    BadCheckpoint(
        what="a tensor of one layer is missing",
        says="The checkpoint lacks the tensor 'model.layers.3.mlp.up_proj.weight'.",
        error=InvalidCheckpoint,
        spoil=header(_renamed),
    ),
    BadCheckpoint(
        what="a tensor has another shape than config.json makes it",
        says="The tensor 'model.layers.0.mlp.down_proj.weight' has shape [80, 48], but "
        "config.json makes it [48, 80].",
        error=InvalidCheckpoint,
        spoil=tensor(_DOWN, shape=[80, 48]),
    ),
    BadCheckpoint(
        what="the shard map names a file that is not there",
        says="The tensor 'model.norm.weight' lies in model-2.safetensors, which {source} has not: "
        "upload it.",
        error=InvalidCheckpoint,
        spoil=_missing_shard,
    ),
    BadCheckpoint(
        what="more layers in config.json than are stored",
        says="config.json: 'num_hidden_layers' is 900, but the checkpoint has no tensors "
        "model.layers.4.*.",
        error=InvalidCheckpoint,
        spoil=config(num_hidden_layers=900),
    ),
    BadCheckpoint(
        what="absurdly many layers in config.json",
        says="config.json: 'num_hidden_layers' is 100000000, expected a whole number up to 1000.",
        error=InvalidCheckpoint,
        spoil=config(num_hidden_layers=10**8),
    ),
    BadCheckpoint(
        what="weights that git-lfs has not fetched",
        says="model.safetensors is only a git-lfs pointer to the file: run `git lfs pull` and "
        "upload the folder again",
        error=InvalidCheckpoint,
        spoil=file(SHARD, _LFS_POINTER),
    ),
    BadCheckpoint(
        what="a tokenizer that git-lfs has not fetched",
        says="tokenizer.json is only a git-lfs pointer to the file: run `git lfs pull` and "
        "upload the folder again",
        error=InvalidCheckpoint,
        spoil=file("tokenizer.json", _LFS_POINTER),
    ),
    BadCheckpoint(
        what="the shard map is empty",
        says="model.safetensors.index.json has no weight_map of file names",
        error=InvalidCheckpoint,
        spoil=_sharded(lambda names: names.clear()),
    ),
    BadCheckpoint(
        what="no safetensors at all",
        says="{source} has neither model.safetensors nor model.safetensors.index.json: convert it "
        "to safetensors",
        error=UnsupportedModel,
        spoil=file(SHARD, None),
    ),
    BadCheckpoint(
        what="a PEFT adapter",
        says="{source} is a PEFT adapter without its base model: merge it into the base model "
        "(merge_and_unload) and deploy what save_pretrained writes of that",
        error=UnsupportedModel,
        spoil=_only("adapter_config.json", "adapter_model.safetensors"),
    ),
    BadCheckpoint(
        what="weights as GGUF",
        says="{source} has its weights as GGUF, which is not supported: deploy the safetensors "
        "that the GGUF file was made from",
        error=UnsupportedModel,
        spoil=_only("model.Q4_K_M.gguf"),
    ),
    BadCheckpoint(
        what="a tokenizer of absurd size",
        says="tokenizer.json has 100000001 bytes, 100000000 at most are allowed",
        error=InvalidCheckpoint,
        spoil=_huge_tokenizer,
    ),
    BadCheckpoint(
        what="no tokenizer",
        says="{source} has no tokenizer.json: save the tokenizer beside the weights "
        "(tokenizer.save_pretrained of a fast tokenizer).",
        error=InvalidCheckpoint,
        spoil=file("tokenizer.json", None),
    ),
    BadCheckpoint(
        what="no config.json",
        says="{source} has no config.json: is it a Hugging Face model folder?",
        error=InvalidCheckpoint,
        spoil=file("config.json", None),
    ),
    BadCheckpoint(
        what="a config.json that is not JSON",
        says="config.json is not valid JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
        error=InvalidCheckpoint,
        spoil=file("config.json", b"{,}"),
    ),
    BadCheckpoint(
        what="a field of config.json is missing",
        says="rope_scaling in config.json: the field 'factor' is missing.",
        error=InvalidCheckpoint,
        spoil=config(rope_scaling={"rope_type": "linear"}),
    ),
    BadCheckpoint(
        what="a field of config.json is of the wrong type",
        says="config.json: 'num_hidden_layers' is '4', expected a whole number above zero.",
        error=InvalidCheckpoint,
        spoil=config(num_hidden_layers="4"),
    ),
    BadCheckpoint(
        what="an architecture we cannot run",
        says=f"Architecture Mystery is not supported; supported are {', '.join(sorted(FAMILIES))}.",
        error=UnsupportedModel,
        spoil=config(architectures=["Mystery"]),
    ),
    BadCheckpoint(
        what="a quantized checkpoint",
        says="The checkpoint is quantized ('gptq'); store it as float32, bfloat16 or float16.",
        error=UnsupportedModel,
        spoil=config(quantization_config={"quant_method": "gptq"}),
    ),
    BadCheckpoint(
        what="names that would disturb a terminal or do not fit an answer",
        says="Architecture \\x1b[2J" + "x" * 977 + "...",
        error=UnsupportedModel,
        spoil=config(architectures=["\x1b[2J" + "x" * 100_000]),
    ),
)


def write_huge_model(folder: Path) -> None:
    """A Llama of 60 GB whose file is one hole: only its header is ever read."""
    hidden, intermediate, layers, vocabulary = 8192, 65536, 16, 128
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{
            f"model.layers.{number}.{name}.weight": shape
            for number in range(layers)
            for name, shape in layer.items()
        },
        _NORM: (hidden,),
    }
    tensors, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    write_shard(folder, json.dumps(tensors).encode(), b"")
    with (folder / SHARD).open("r+b") as shard:
        shard.truncate(shard.seek(0, 2) + end)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(fields))
