from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.errors import InvalidCheckpoint, InvalidRequest
from paraserve_backend.weights.checkpoint.fetch_plan import (
    FetchPlan,
    coalesce,
    plan_fetch,
    split_parts,
)
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.stages import split_layers, stage_tensors
from paraserve_backend.weights.sources.base import ObjectRange
from tests.support.checkpoints import NAMES, make_index, make_plan

EMBEDDING, HEAD = NAMES.embedding[0], NAMES.head


@st.composite
def indexes(draw: st.DrawFn, *, max_layers: int = 7) -> CheckpointIndex:
    """Indexes of models with layers of any size, their tensors in any order in some objects."""
    sizes = st.integers(1, 1000)
    fixed = {name: draw(sizes) for name in (EMBEDDING, *NAMES.final, HEAD)}
    layers = {
        f"{NAMES.layer_prefix}{layer}.{part}": draw(sizes)
        for layer in range(draw(st.integers(1, max_layers)))
        for part in ("attn.weight", "mlp.weight")
    }
    order = draw(st.permutations(list((fixed | layers).items())))
    return make_index(dict(order), objects=draw(st.integers(1, 3)))


def num_layers(index: CheckpointIndex) -> int:
    return sum(name.endswith("attn.weight") for name in index.tensors)


def bytes_of(ranges: tuple[ObjectRange, ...]) -> Counter[tuple[str, int]]:
    return Counter(
        (part.object_key, position) for part in ranges for position in range(part.start, part.end)
    )


def stage_bytes(index: CheckpointIndex, layers: LayerRange, *, tied: bool) -> int:
    return sum(
        tensor.size_bytes for tensor in stage_tensors(index, NAMES, tied=tied, layers=layers)
    )


@given(indexes(), st.data(), st.booleans())
def test_stages_together_hold_the_whole_model_and_the_embedding_twice_only_if_tied(
    index: CheckpointIndex, data: st.DataObject, tied: bool
) -> None:
    stages = data.draw(st.integers(1, num_layers(index)))
    split = split_layers(index, NAMES, tied=tied, num_layers=num_layers(index), stages=stages)
    held = Counter(
        tensor.name
        for layers in split
        for tensor in stage_tensors(index, NAMES, tied=tied, layers=layers)
    )
    expected = Counter(index.tensors.keys())
    if tied:
        del expected[HEAD]
        expected[EMBEDDING] = 2 if stages > 1 else 1
    assert held == expected


@given(indexes(), st.data(), st.booleans())
def test_split_covers_the_layers_in_order_and_no_split_has_a_smaller_largest_stage(
    index: CheckpointIndex, data: st.DataObject, tied: bool
) -> None:
    total = num_layers(index)
    stages = data.draw(st.integers(1, total))
    split = split_layers(index, NAMES, tied=tied, num_layers=total, stages=stages)
    assert [layers.start for layers in split] == [0, *(layers.end for layers in split[:-1])]
    assert (len(split), split[-1].end) == (stages, total)

    def largest(bounds: tuple[int, ...]) -> int:
        return max(
            stage_bytes(index, LayerRange(start=start, end=end, total=total), tied=tied)
            for start, end in pairwise(bounds)
        )

    every = ((0, *inner, total) for inner in combinations(range(1, total), stages - 1))
    assert largest((0, *(layers.end for layers in split))) == min(map(largest, every))


def test_equal_layers_are_split_evenly() -> None:
    sizes = {f"{NAMES.layer_prefix}{layer}.weight": 100 for layer in range(10)}
    index = make_index({EMBEDDING: 1, **sizes, NAMES.final[0]: 1, HEAD: 1})
    split = split_layers(index, NAMES, tied=False, num_layers=10, stages=4)
    assert sorted(len(layers) for layers in split) == [2, 2, 3, 3]


@pytest.mark.parametrize("stages", [0, 3])
def test_more_stages_than_layers_or_none_are_refused(stages: int) -> None:
    sizes = {f"{NAMES.layer_prefix}{layer}.weight": 1 for layer in range(2)}
    index = make_index({EMBEDDING: 1, **sizes, NAMES.final[0]: 1, HEAD: 1})
    with pytest.raises(InvalidRequest, match="1 to 2 stages"):
        split_layers(index, NAMES, tied=False, num_layers=2, stages=stages)


@given(indexes(), st.integers(1, 300))
def test_parts_hold_every_byte_of_the_tensors_once_and_no_other(
    index: CheckpointIndex, part_bytes: int
) -> None:
    layers = LayerRange(start=0, end=num_layers(index), total=num_layers(index))
    tensors = stage_tensors(index, NAMES, tied=False, layers=layers)
    wanted = Counter(
        (tensor.object_key, position)
        for tensor in tensors
        for position in range(tensor.start, tensor.end)
    )
    ranges = coalesce(tensors)
    parts = split_parts(ranges, part_bytes)
    assert bytes_of(ranges) == wanted == bytes_of(parts)
    assert max(part.size_bytes for part in parts) <= part_bytes


@given(indexes(), st.integers(1, 300), st.data())
def test_plans_with_other_layers_have_all_parts_in_common_but_those_at_ends_of_ranges(
    index: CheckpointIndex, part_bytes: int, data: st.DataObject
) -> None:
    total = num_layers(index)
    start = data.draw(st.integers(0, total - 1))
    layers = LayerRange(start=start, end=data.draw(st.integers(start + 1, total)), total=total)
    whole, stage = (
        split_parts(coalesce(stage_tensors(index, NAMES, tied=False, layers=it)), part_bytes)
        for it in (LayerRange(start=0, end=total, total=total), layers)
    )
    ends = len(coalesce(stage_tensors(index, NAMES, tied=False, layers=layers))) * 2
    assert len(set(stage) - set(whole)) <= ends


def test_neighbours_become_one_range_and_what_is_wanted_first_stays_first() -> None:
    # Stored by name, as checkpoints are: layer 10 lies before layer 2.
    stored = sorted(f"{NAMES.layer_prefix}{layer}.weight" for layer in range(12))
    index = make_index(dict.fromkeys([*stored, EMBEDDING, *NAMES.final, HEAD], 4))
    layers = LayerRange(start=0, end=11, total=12)
    ranges = coalesce(stage_tensors(index, NAMES, tied=False, layers=layers))
    # Embedding, layers 0-1, layers 2-9, layer 10.
    assert [(part.start, part.end) for part in ranges] == [(56, 60), (8, 16), (24, 56), (16, 20)]


@pytest.mark.parametrize("missing", [EMBEDDING, HEAD, NAMES.final[0], "model.layers.1.weight"])
def test_a_missing_tensor_is_named(missing: str) -> None:
    sizes = {f"{NAMES.layer_prefix}{layer}.weight": 1 for layer in range(2)}
    sizes |= dict.fromkeys((EMBEDDING, *NAMES.final, HEAD), 1)
    del sizes[missing]
    layers = LayerRange(start=0, end=2, total=2)
    with pytest.raises(InvalidCheckpoint, match=missing.removesuffix(".weight")):
        stage_tensors(make_index(sizes), NAMES, tied=False, layers=layers)


def test_a_plan_has_the_objects_it_reads_and_survives_json(model: Path) -> None:
    plan = make_plan(model, layers=(0, 1))
    assert {tensor.object_key for tensor in plan.tensors} == {item.key for item in plan.objects}
    assert plan.total_bytes == sum(part.size_bytes for part in plan.ranges)
    assert [stored.key for stored in plan.files] == ["config.json", "tokenizer.json"]
    assert FetchPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("fetch_id", ["", ".", "../up", "a/b", "A", "a" * 201, "a\n"])
def test_a_fetch_id_that_is_no_safe_folder_name_is_refused(fetch_id: str) -> None:
    with pytest.raises(InvalidRequest, match="fetch id"):
        plan_fetch(make_index({"a": 1}), (), fetch_id=fetch_id)


@pytest.mark.parametrize("key", ["../up", "/etc/passwd", "", ".."])
def test_a_plan_with_a_key_outside_the_model_folder_is_refused(model: Path, key: str) -> None:
    plan = make_plan(model)
    with pytest.raises(InvalidRequest, match="not the name of a file"):
        replace(plan, files=(replace(plan.files[0], key=key),))


def test_a_plan_whose_tensors_do_not_fit_its_objects_is_refused(model: Path) -> None:
    plan = make_plan(model)
    with pytest.raises(InvalidRequest, match="outside its object"):
        replace(plan, objects=plan.objects[:1])
    with pytest.raises(InvalidRequest, match="named twice"):
        replace(plan, tensors=plan.tensors * 2)
    again = msgspec.structs.replace(plan.tensors[0], name="again")
    with pytest.raises(InvalidRequest, match="overlaps"):
        replace(plan, tensors=(*plan.tensors, again))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"fetch_id": 3}'])
def test_json_that_is_no_plan_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a fetch plan"):
        FetchPlan.from_json(text)
