"""Random checkpoints for the demo, the benchmarks and the tests: real files, no trained weights.

The tokenizer is real, trained on the texts of this repository. `transformers` is imported only by
what needs it: the raw writer makes gigabytes in seconds without it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

REPOSITORY = Path(__file__).resolve().parents[2]
END_OF_TEXT = "<|endoftext|>"
_VOCABULARY = 4096
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int = _VOCABULARY
    max_context: int = 2048
    is_tied: bool = False
    #: Spread of the random weights; large enough that greedy tokens vary.
    spread: float = 0.05

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def config(self, dtype: str) -> dict[str, Any]:
        """Return the config.json of a LlamaForCausalLM of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": dtype,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.max_context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": self.is_tied,
            "initializer_range": self.spread,
            "bos_token_id": None,
            "eos_token_id": 0,
        }


def train_tokenizer(texts: Iterator[str], vocabulary: int = _VOCABULARY) -> Tokenizer:
    """Train a byte-level BPE tokenizer; its token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def repository_texts() -> Iterator[str]:
    """Yield the prose of this repository."""
    for path in (REPOSITORY / "LICENSE", *sorted(REPOSITORY.glob("*.md"))):
        yield path.read_text(encoding="utf-8")
    for folder in ("docs", "backend", "scheduler"):
        for pattern in ("*.md", "*.py"):
            for path in sorted((REPOSITORY / folder).rglob(pattern)):
                yield path.read_text(encoding="utf-8")


def write_tokenizer(folder: Path) -> None:
    """Write a trained tokenizer the way Hugging Face's fast tokenizers are saved."""
    train_tokenizer(repository_texts()).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_with_transformers(folder: Path, shape: LlamaShape, *, shard: str, seed: int = 0) -> None:
    """Write an fp32 checkpoint with `save_pretrained`, in shards of at most `shard` ("64MB")."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape.config("float32")))
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished, max_shard_size=shard)
        write_tokenizer(unfinished)


def write_raw_bf16(
    folder: Path,
    shape: LlamaShape,
    *,
    shard_bytes: int,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda _bytes: None,
) -> None:
    """Write a bf16 checkpoint straight to safetensors files.

    `on_progress` gets the bytes written since its last call.
    """
    with atomic_folder(folder) as unfinished:
        write_tokenizer(unfinished)
        config = json.dumps(shape.config("bfloat16"), indent=2)
        (unfinished / "config.json").write_text(config, encoding="utf-8")
        shards = _shards(llama_tensors(shape), shard_bytes)
        weight_map: dict[str, str] = {}
        generator = torch.Generator().manual_seed(seed)
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(shard, name)
            _write_shard(unfinished / name, shard, shape.spread, generator, on_progress)
        index = {"metadata": {"total_size": llama_bytes(shape)}, "weight_map": weight_map}
        text = json.dumps(index, indent=2)
        (unfinished / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def llama_bytes(shape: LlamaShape) -> int:
    """Return the size of all weights in bf16."""
    return sum(2 * prod(size) for size in llama_tensors(shape).values())


def llama_tensors(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a LlamaForCausalLM and their shapes, in the order of use."""
    kv_width = shape.kv_heads * shape.head_size
    layer = {
        "input_layernorm.weight": (shape.hidden,),
        "self_attn.q_proj.weight": (shape.hidden, shape.hidden),
        "self_attn.k_proj.weight": (kv_width, shape.hidden),
        "self_attn.v_proj.weight": (kv_width, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, shape.hidden),
        "post_attention_layernorm.weight": (shape.hidden,),
        "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
    }
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden)
    }
    for number in range(shape.layers):
        tensors |= {f"model.layers.{number}.{name}": size for name, size in layer.items()}
    tensors["model.norm.weight"] = (shape.hidden,)
    if not shape.is_tied:
        tensors["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return tensors


def cached(folder: Path, shape: LlamaShape, write: Callable[[Path], object]) -> Path:
    """Return `folder` with a checkpoint of this shape, written only if it is not there yet."""
    mark = folder / "shape.json"
    wanted = json.dumps(asdict(shape), sort_keys=True)
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        write(folder)
        mark.write_text(wanted, encoding="utf-8")
    return folder


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder that appears under its name only when the body has succeeded."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _shards(
    tensors: Mapping[str, tuple[int, ...]], shard_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in tensors.items():
        tensor_bytes = 2 * prod(size)
        if shards[-1] and filled + tensor_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += tensor_bytes
    return shards


def _write_shard(
    path: Path,
    tensors: Mapping[str, tuple[int, ...]],
    spread: float,
    generator: torch.Generator,
    on_progress: Callable[[int], None],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, size in tensors.items():
        end = position + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, size in tensors.items():
            for chunk in _values(name, prod(size), spread, generator):
                file.write(chunk)
                on_progress(len(chunk))


def _values(name: str, count: int, spread: float, generator: torch.Generator) -> Iterator[bytes]:
    """Yield the bytes of one tensor: ones for a norm, else random values."""
    for start in range(0, count, _CHUNK_ELEMENTS):
        part = torch.empty(min(_CHUNK_ELEMENTS, count - start))
        if "norm" in name:
            part.fill_(1.0)
        else:
            part.normal_(0.0, spread, generator=generator)
        yield part.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
