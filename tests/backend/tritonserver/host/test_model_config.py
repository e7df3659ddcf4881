from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig

from paraserve_backend.protocol.names import SlotKind
from paraserve_backend.protocol.parameters import SlotConfig, read_config
from paraserve_backend.tritonserver.host.model_config import (
    SlotPlace,
    places,
    slot_files,
    slotted_model,
    with_steps,
)
from tests.support.agents import ensemble_files, model_files


def parsed(files: dict[str, bytes]) -> ModelConfig:
    return text_format.Parse(files["config.pbtxt"].decode(), ModelConfig())


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        ("generate", SlotKind.FRONT),
        ("stage", SlotKind.STAGE),
        ("link", SlotKind.LINK),
    ],
)
def test_a_model_fits_where_its_role_and_device_are(role: str, kind: SlotKind) -> None:
    found = slotted_model(model_files(role, device="cuda:1"))
    assert found is not None
    # A link computes nothing.
    device = "cpu" if role == "link" else "cuda:1"
    assert found.place == SlotPlace(kind=kind, device=device)
    assert found.parameters == {"role": role, "device": "cuda:1"}


@pytest.mark.parametrize(
    "files",
    [
        model_files("generate", engine="vllm"),
        model_files("generate", backend="onnxruntime"),
        model_files("slot"),
        ensemble_files("a", "b"),
        {"config.pbtxt": b"no { config"},
        {"config.pbtxt": b"\xff"},
        {},
    ],
)
def test_other_models_need_a_process_of_their_own(files: dict[str, bytes]) -> None:
    assert slotted_model(files) is None


def test_an_ensembles_steps_become_the_slots_and_nothing_else_changes() -> None:
    files = ensemble_files("d.1.stage0", "d.1.link")
    renamed = with_steps(files, {"d.1.stage0": "slot-1.stage"})
    before, after = parsed(files), parsed(dict(renamed))
    assert [it.model_name for it in after.ensemble_scheduling.step] == ["slot-1.stage", "d.1.link"]
    after.ensemble_scheduling.step[0].model_name = "d.1.stage0"
    assert after == before
    assert renamed["1/.keep"] == files["1/.keep"]


@given(st.dictionaries(st.text(), st.text()))
def test_without_its_steps_among_the_slots_an_ensemble_means_the_same(
    slots: dict[str, str],
) -> None:
    files = ensemble_files("d.1.stage0", "d.1.link")
    assert parsed(dict(with_steps(files, slots))) == parsed(files)


def test_files_of_other_models_stay_as_they_are() -> None:
    files = model_files("stage")
    assert with_steps(files, {"d.1.stage0": "slot-1.stage"}) == files


@pytest.mark.parametrize("place", places(["cpu", "cuda:0"]))
def test_a_slots_config_says_what_its_role_reads(place: SlotPlace, tmp_path: Path) -> None:
    config = parsed(dict(slot_files("slot-7.x", place, str(tmp_path))))
    parameters = {key: {"string_value": it.string_value} for key, it in config.parameters.items()}
    assert read_config(json.dumps({"parameters": parameters})) == SlotConfig(
        kind=place.kind, device=place.device, run_dir=tmp_path
    )
    assert (config.name, config.backend, config.max_batch_size) == ("slot-7.x", "paraserve", 0)
    # Commands come without tensors.
    assert all(it.optional for it in config.input)
    # Only a front answers a request more than once.
    is_front = place.kind is SlotKind.FRONT
    assert config.model_transaction_policy.decoupled is is_front
    (group,) = config.instance_group
    assert list(group.gpus) == ([] if place.device == "cpu" else [0])


def test_a_set_is_a_front_and_a_stage_on_every_device_and_one_link() -> None:
    kinds = [(place.kind.value, place.device) for place in places(["cuda:0", "cuda:1"])]
    assert kinds == [
        ("front", "cuda:0"),
        ("stage", "cuda:0"),
        ("front", "cuda:1"),
        ("stage", "cuda:1"),
        ("link", "cpu"),
    ]
