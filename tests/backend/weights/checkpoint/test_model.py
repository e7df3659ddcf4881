"""Checkpoints with gaps and extras, read as at deploy, answer as transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from paraserve_backend.architectures.spec import Dtype, LayerRange
from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.engines.native.model.stage import StageEngine, StageModel
from paraserve_backend.errors import InvalidCheckpoint
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan, plan_fetch
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.model import read_model, spec_of, spec_of_fetched
from paraserve_backend.weights.checkpoint.stages import stage_tensors
from paraserve_backend.weights.sources.open import open_source
from tests.support.checkpoints import header_of, safetensors_file
from tests.support.models import CONFIGS, Chain, TinyModel, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [5, 3, 8, 1, 9, 7, 2]
NEW_TOKENS = 8
SHARD = "model.safetensors"
SHARD_MAP = "model.safetensors.index.json"
Weights = dict[str, torch.Tensor]


def read(folder: Path) -> CheckpointIndex:
    return read_model(open_source(str(folder)))


def change_config(folder: Path, *removed: str, **fields: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / SHARD)
    change(weights)
    save_file(weights, folder / SHARD)


def shard(folder: Path, parts: Sequence[Callable[[str], bool]]) -> None:
    """Deal the one file out to one file per part: what the part picks by name."""
    weights = load_file(folder / SHARD)
    (folder / SHARD).unlink()
    weight_map: dict[str, str] = {}
    for number, picks in enumerate(parts, start=1):
        key = f"model-{number:05}-of-{len(parts):05}.safetensors"
        part = {name: tensor for name, tensor in weights.items() if picks(name)}
        save_file(part, folder / key)
        weight_map |= dict.fromkeys(part, key)
    (folder / SHARD_MAP).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_map(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / SHARD_MAP).read_text())
    change(fields["weight_map"])
    (folder / SHARD_MAP).write_text(json.dumps(fields))


def theirs(folder: Path) -> list[int]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
        )
    return [int(token) for token in ids[0, len(PROMPT) :]]


def ours(folder: Path, stages: int) -> list[int]:
    """What stages generate that know of the checkpoint what their fetch plans say."""
    index = read(folder)
    spec = spec_of(index)
    weights = {
        name: tensor
        for stored in index.objects
        for name, tensor in load_file(folder / stored.key).items()
    }
    sizes = [spec.num_layers // stages] * (stages - 1)
    sizes.append(spec.num_layers - sum(sizes))
    chain = Chain(TinyModel(folder=folder, spec=spec, weights=weights, oracle=None), sizes)
    plans = [plan_of(index, engine.model.layers) for engine in chain.engines]
    chain.engines = [
        stage_engine(folder, plan, engine.model.layers, weights)
        for plan, engine in zip(plans, chain.engines, strict=True)
    ]
    return chain.generate(chain.request(PROMPT), NEW_TOKENS)


def plan_of(index: CheckpointIndex, layers: LayerRange) -> FetchPlan:
    spec = spec_of(index)
    tensors = stage_tensors(index, spec.names, tied=spec.tie_word_embeddings, layers=layers)
    plan = plan_fetch(index, tensors, fetch_id="fetch-1")
    return FetchPlan.from_json(plan.to_json())


def stage_engine(
    folder: Path, plan: FetchPlan, layers: LayerRange, weights: Mapping[str, torch.Tensor]
) -> StageEngine:
    spec = spec_of_fetched(json.loads((folder / "config.json").read_text()), {}, plan)
    fetched = {tensor.name: weights[tensor.name] for tensor in plan.tensors}
    own = TinyModel(folder=folder, spec=spec, weights=fetched, oracle=None)
    cache = KvCache(spec, layers, num_blocks=64, block_size=4)
    return StageEngine(StageModel(spec, layers, own, cache))


def agree(folder: Path) -> None:
    expected = theirs(folder)
    for stages in (1, 2, 3):
        assert ours(folder, stages) == expected


GAPS: Mapping[str, tuple[str, ...]] = {
    "type": ("dtype",),
    "norm": ("rms_norm_eps",),
    "context": ("max_position_embeddings",),
    "architectures": ("architectures",),
    "activation": ("hidden_act",),
    "end": ("eos_token_id",),
    "all of them": ("dtype", "rms_norm_eps", "architectures", "hidden_act", "eos_token_id"),
}


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gaps_of_a_config_are_filled_as_transformers_fills_them(
    family: str, gap: str, tmp_path: Path
) -> None:
    write_model(tmp_path, family)
    change_config(tmp_path, *GAPS[gap])
    agree(tmp_path)


@pytest.mark.parametrize("end", [-1, [-1], None, []])
def test_an_end_token_that_is_none_ends_nothing(end: object, tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    change_config(tmp_path, eos_token_id=end)
    agree(tmp_path)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_type_the_stored_one_counts(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_model(tmp_path, family, dtype=dtype)
    change_config(tmp_path, "dtype")
    assert spec_of(read(tmp_path)).dtype == Dtype(str(dtype).removeprefix("torch."))
    agree(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_of_two_stored_types_all_stages_take_the_same(
    first: torch.dtype, shards: int, tmp_path: Path
) -> None:
    write_model(tmp_path, "llama")
    second = torch.float32 if first is torch.bfloat16 else torch.bfloat16

    def mix(weights: Weights) -> None:
        for name, tensor in weights.items():
            weights[name] = tensor.to(second if "layers" in name else first)

    change_weights(tmp_path, mix)
    if shards == 2:
        shard(tmp_path, [lambda name: "layers" not in name, lambda name: "layers" in name])
    change_config(tmp_path, "dtype")
    agree(tmp_path)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_stored_head_that_differs_from_the_embedding_is_used(family: str, tmp_path: Path) -> None:
    write_model(tmp_path, family, tie_word_embeddings=False)
    change_config(tmp_path, tie_word_embeddings=True)
    agree(tmp_path)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_stored_head_that_equals_the_embedding_changes_nothing(
    family: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path, family, tie_word_embeddings=True)
    before = theirs(tmp_path)
    embedding = model.weights[model.spec.names.embedding[0]]
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": embedding.clone()}))
    agree(tmp_path)
    assert theirs(tmp_path) == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "falcon"])
def test_a_head_that_is_stored_instead_of_the_embedding_is_both(
    family: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path, family, tie_word_embeddings=True)
    name = model.spec.names.embedding[0]
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": weights.pop(name)}))
    agree(tmp_path)


EXTRAS: Mapping[str, torch.Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4),
    "model.layers.2.self_attn.bias": torch.ones(4, 4, dtype=torch.bool),
    "model.layers.99.mlp.up_proj.weight": torch.ones(3),
    "model.layers.x.weight": torch.ones(3),
    "a": torch.ones(2, dtype=torch.int64),
    "optimizer.state": torch.ones(5, dtype=torch.float64),
    "v_head.summary.weight": torch.zeros(1, 48, dtype=torch.float8_e4m3fn),
}


def test_tensors_that_nobody_needs_refuse_nothing_and_are_not_fetched(tmp_path: Path) -> None:
    model = write_model(tmp_path, "llama")
    needed = set(read(tmp_path).tensors)
    change_weights(tmp_path, lambda weights: weights.update(EXTRAS))
    index = read(tmp_path)
    assert set(index.tensors) == needed
    assert plan_of(index, LayerRange(start=0, end=5, total=5)).total_bytes == sum(
        tensor.nbytes for tensor in model.weights.values()
    )
    agree(tmp_path)


def test_shards_and_entries_that_nobody_needs_refuse_nothing(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    change_weights(tmp_path, lambda weights: weights.update(EXTRAS))
    shard(
        tmp_path,
        [lambda name: "layers" in name and name not in EXTRAS, EXTRAS.__contains__, plain_name],
    )
    expected = theirs(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    change_map(tmp_path, lambda names: names.update(more="../up", other=None, third={}))
    index = read(tmp_path)
    assert [stored.key for stored in index.objects] == [
        "model-00001-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    for stages in (1, 2):
        assert ours(tmp_path, stages) == expected


def plain_name(name: str) -> bool:
    return "layers" not in name and name not in EXTRAS


def test_a_shard_of_nothing_that_is_needed_is_not_fetched(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    change_weights(tmp_path, lambda weights: weights.update(EXTRAS))
    shard(tmp_path, [lambda name: name not in EXTRAS, EXTRAS.__contains__])
    assert [stored.key for stored in read(tmp_path).objects] == ["model-00001-of-00002.safetensors"]


def test_a_shard_that_is_needed_and_missing_is_named_with_its_tensor(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    shard(tmp_path, [lambda name: "layers" in name, plain_name])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    sentence = (
        "'model.embed_tokens.weight' lies in model-00002-of-00002.safetensors, which .* has not"
    )
    with pytest.raises(InvalidCheckpoint, match=sentence):
        read(tmp_path)


@pytest.mark.parametrize("layers", [6, 900, 1000])
def test_more_layers_than_are_stored_are_refused_in_one_sentence(
    layers: int, tmp_path: Path
) -> None:
    write_model(tmp_path, "llama")
    change_config(tmp_path, num_hidden_layers=layers)
    sentence = rf"'num_hidden_layers' is {layers}, but .* no tensors model\.layers\.5\.\*"
    with pytest.raises(InvalidCheckpoint, match=sentence):
        read(tmp_path)


def test_layers_that_config_json_does_not_count_are_left_out(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    change_config(tmp_path, num_hidden_layers=3)
    agree(tmp_path)


@pytest.mark.parametrize("dtype", ["I32", "F13", "F8_E4M3"])
def test_a_needed_tensor_of_a_type_that_is_for_no_weights_is_refused(
    dtype: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path, "llama")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.weights.items()}
    header = header_of(shapes)
    header["model.norm.weight"]["dtype"] = dtype
    if dtype == "F8_E4M3":
        header["model.norm.weight"]["shape"] = [4 * 48]
    size_bytes = sum(tensor.nbytes for tensor in model.weights.values())
    (tmp_path / SHARD).write_bytes(safetensors_file(header, bytes(size_bytes)))
    with pytest.raises(InvalidCheckpoint, match=r"'model\.norm\.weight' has (data type|shape)"):
        read(tmp_path)


def test_the_spec_of_a_stored_index_is_that_of_the_deploy(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", dtype=torch.bfloat16)
    change_config(tmp_path, "dtype", tie_word_embeddings=True)
    index = read(tmp_path)
    assert CheckpointIndex.from_json(index.to_json()) == index
    assert spec_of(CheckpointIndex.from_json(index.to_json())) == spec_of(index)
    assert not spec_of(index).tie_word_embeddings
    assert spec_of(replace(index, dtype="F16")).dtype is Dtype.FLOAT16
