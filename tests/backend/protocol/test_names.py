from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.protocol.names import (
    ReplicaModels,
    SlotKind,
    deployment_of,
    fetch_id,
    named_deployment,
    replica_id,
    replica_of,
    slot_model,
)

_DEPLOYMENTS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
#: Those of a simulation may be called anything.
_ANY_NAMES = _DEPLOYMENTS | st.text()
_NUMBERS = st.integers(0, 10**9)
_REPLICAS = st.builds(replica_id, _DEPLOYMENTS, _NUMBERS)


def test_names_are_what_they_always_were() -> None:
    """They lie on disks and are exchanged with nodes of other versions."""
    models = ReplicaModels(replica_id("tiny", 7))
    assert models.generate == "tiny.7"
    assert (models.forward, models.link) == ("tiny.7.forward", "tiny.7.link")
    assert models.stage(2) == "tiny.7.stage2"
    assert fetch_id("tiny.7", 2) == "tiny.7.2"
    assert slot_model(3, SlotKind.FRONT) == "slot-3.front"


@given(_ANY_NAMES, _NUMBERS, _NUMBERS)
def test_an_id_tells_what_it_was_made_of(deployment: str, number: int, stage: int) -> None:
    replica = replica_id(deployment, number)
    assert deployment_of(replica) == deployment
    assert replica_of(fetch_id(replica, stage)) == replica


@pytest.mark.parametrize("text", ["", "tiny", "slot-3"])
def test_what_is_no_id_has_nothing_before_its_number(text: str) -> None:
    assert deployment_of(text) == replica_of(text) == ""


@given(_DEPLOYMENTS, _NUMBERS)
def test_a_user_may_name_a_deployment_or_one_of_its_replicas(deployment: str, number: int) -> None:
    replica = replica_id(deployment, number)
    assert named_deployment(deployment) == deployment
    assert named_deployment(replica) == named_deployment(f"{replica}.stage0") == deployment


@given(_REPLICAS, _REPLICAS, _NUMBERS)
def test_replicas_have_no_model_in_common(one: str, other: str, stage: int) -> None:
    models = ReplicaModels(one)
    own = [models.generate, models.forward, models.link, models.stage(stage)]
    assert len(set(own)) == len(own)
    assert all(model in models for model in own)
    assert all((model in ReplicaModels(other)) == (one == other) for model in own)


@given(_REPLICAS, _NUMBERS)
def test_a_short_name_is_the_same_for_every_replica(replica: str, stage: int) -> None:
    models = ReplicaModels(replica)
    own = (models.generate, models.forward, models.link, models.stage(stage))
    assert [*map(models.short, own)] == ["generate", "forward", "link", f"stage{stage}"]


@pytest.mark.parametrize("model", ["slot-3.front", "tiny.10", "tiny.10.stage0", "stage0", ""])
def test_what_is_not_the_replicas_keeps_its_name(model: str) -> None:
    models = ReplicaModels("tiny.1")
    assert model not in models
    assert models.short(model) == model


@given(st.lists(st.tuples(_NUMBERS, st.sampled_from(SlotKind)), unique=True))
def test_no_two_slots_share_a_model(slots: list[tuple[int, SlotKind]]) -> None:
    assert len({slot_model(number, kind) for number, kind in slots}) == len(slots)
