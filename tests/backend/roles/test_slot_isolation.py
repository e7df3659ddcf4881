"""Nothing of what a slot was is there for what it becomes next."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paraserve_backend.engines.native.loop import GenerateLoop, Request
from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.generation.answer import Answer
from paraserve_backend.generation.sequence import TokenSequence
from paraserve_backend.protocol import forward_codec
from paraserve_backend.protocol.forward import ForwardBatch
from paraserve_backend.protocol.names import SlotKind
from paraserve_backend.protocol.parameters import (
    GenerateConfig,
    RoleConfig,
    SlotConfig,
    StageConfig,
    format_layers,
)
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.sampling import Sampling
from paraserve_backend.roles.generate import GenerateRole
from paraserve_backend.roles.slot import SlotRole
from paraserve_backend.roles.stage import StageRole
from paraserve_backend.roles.weights import open_weights
from tests.support.models import TinyModel
from tests.support.ports import free_ports
from tests.support.replicas import (
    Gauges,
    Reply,
    fetch_stages,
    make_model,
    make_request,
    prompts,
)

pytestmark = pytest.mark.usefixtures("one_thread")

#: Whoever holds one of these knows something of a replica or its requests.
TELLING = (
    *(StageRole, GenerateRole, GenerateLoop, GenerateConfig, KvCache, torch.Tensor),
    *(Answer, ForwardBatch, GenerateRequest, Request, TokenSequence),
)


def telling_objects() -> set[int]:
    gc.collect()
    return {id(found) for found in gc.get_objects() if issubclass(type(found), TELLING)}


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return make_model(tmp_path)


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[SlotRole[GenerateRole]]:
    def build(config: RoleConfig) -> GenerateRole:
        assert isinstance(config, GenerateConfig)
        return GenerateRole(replace(config, hand_over=None), None, Gauges())

    config = SlotConfig(kind=SlotKind.FRONT, device="cpu", run_dir=tmp_path / "run")
    slot = SlotRole(config, build)
    yield slot
    slot.unbind()


def bind(slot: SlotRole[GenerateRole], model: TinyModel, replica: str) -> None:
    run_dir = model.folder / "run"
    run_dir.mkdir(exist_ok=True)
    fetch_stages(model, run_dir, 1, replica)
    slot.bind(
        {
            "role": "generate",
            "replica": replica,
            "run_dir": str(run_dir),
            "fetch_id": f"{replica}.0",
            "kv_blocks": "64",
            "block_size": "4",
            "key_file": f"{run_dir}/keys/{replica}/curve.key",
        }
    )


def generate(slot: SlotRole[GenerateRole], replica: str, prompt: list[int]) -> list[int]:
    reply, sampling = Reply(), Sampling(temperature=0.9, seed=77)
    with slot.use(replica) as role:
        role.add(make_request(prompt, 8, sampling=sampling), reply)
    return reply.token_ids()


def kv_cache(slot: SlotRole[GenerateRole], replica: str) -> KvCache:
    with slot.use(replica) as role:
        cache: KvCache = role._loop._forward._engine.model.kv_cache  # type: ignore[attr-defined]
        return cache


def test_nothing_that_tells_of_a_replica_outlives_its_unbind(
    slot: SlotRole[GenerateRole], model: TinyModel
) -> None:
    before, threads = telling_objects(), threading.active_count()
    bind(slot, model, "d.1")
    generate(slot, "d.1", prompts(1)[0])
    with slot.use("d.1") as role:
        watched = weakref.ref(role)
    del role
    assert telling_objects() - before  # the check would see them
    slot.unbind()
    assert watched() is None
    assert telling_objects() - before == set()
    assert threading.active_count() == threads
    assert forward_codec._sampling.cache_info().currsize == 0


def test_the_next_replica_finds_an_empty_kv_cache(
    slot: SlotRole[GenerateRole], model: TinyModel
) -> None:
    bind(slot, model, "d.1")
    generate(slot, "d.1", prompts(1)[0])
    assert kv_cache(slot, "d.1").storage.any()
    slot.unbind()
    bind(slot, model, "e.1")
    assert not kv_cache(slot, "e.1").storage.any()


def test_a_request_draws_the_same_after_another_replica_as_in_a_fresh_process(
    slot: SlotRole[GenerateRole], model: TinyModel
) -> None:
    state = torch.get_rng_state()
    bind(slot, model, "d.1")
    first = generate(slot, "d.1", [5, 9, 33])
    slot.unbind()
    bind(slot, model, "e.1")
    assert generate(slot, "e.1", [5, 9, 33]) == first
    slot.unbind()
    # Nothing drew from the process's own generator: it is as it was.
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_of_a_stage_in_the_channel_outlives_its_unbind(model: TinyModel) -> None:
    def build(config: RoleConfig) -> StageRole:
        assert isinstance(config, StageConfig)
        return StageRole(config, open_weights(config.weights))

    run_dir = model.folder / "run"
    run_dir.mkdir()
    _, config = fetch_stages(model, run_dir, 2, "d.1")
    assert config.key_file is not None
    key_file = run_dir / "keys" / "d.1" / "curve.key"
    key_file.parent.mkdir(parents=True)
    config.key_file.rename(key_file)
    parameters = {
        "role": "stage",
        "layers": format_layers(config.layers),
        "replica": "d.1",
        "run_dir": str(run_dir),
        "fetch_id": "d.1.1",
        "kv_blocks": "64",
        "key_file": str(key_file),
    }
    slot = SlotRole(SlotConfig(kind=SlotKind.STAGE, device="cpu", run_dir=run_dir), build)
    before, threads = telling_objects(), threading.active_count()
    # The next one gets the same port: it must be free.
    for port in 2 * free_ports(1):
        address = f"tcp://127.0.0.1:{port}"
        slot.bind(parameters | {"listen": address, "next": address})
        assert telling_objects() - before
        slot.unbind()
        assert telling_objects() - before == set()
        assert threading.active_count() == threads
