from __future__ import annotations

import resource
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from paraserve_backend.architectures.spec import Dtype
from paraserve_backend.errors import (
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
    UnsupportedModel,
)
from paraserve_backend.protocol.names import EngineName
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.control_plane.api.admission import read_deployment, validated_spec
from paraserve_scheduler.control_plane.config import DeploymentDefaults
from paraserve_scheduler.control_plane.messages.status import spec_message
from paraserve_scheduler.state.spec import DeploymentSpec
from tests.support.scheduler_records import make_spec, write_model

DEFAULTS = DeploymentDefaults(max_sequences=8, max_replicas=3, max_waiting=50)


def test_what_the_user_leaves_out_is_filled_in() -> None:
    spec = validated_spec(pb.DeploymentSpec(name="tiny", source="/models/tiny"), DEFAULTS)
    assert spec == make_spec(
        source="/models/tiny",
        keep_alive_s=None,
        max_sequences=8,
        max_replicas=3,
        max_waiting=50,
        consolidate=True,
    )


def test_whatever_the_user_states_is_kept_and_shown_again() -> None:
    message = pb.DeploymentSpec(
        name="tiny",
        source="s3://models/tiny",
        ttft_slo_s=5.0,
        tpot_slo_s=0.1,
        endpoint_url="http://store",
        region="eu",
        keep_alive_s=300.0,
        max_stages=2,
        max_context=64,
        max_sequences=9,
        device="cuda",
        consolidate=False,
        engine="vllm",
        min_replicas=1,
        max_replicas=5,
        priority=-3,
        max_waiting=7,
    )
    # A field that is new in the message must be stated here too.
    assert len(message.ListFields()) == len(pb.DeploymentSpec.DESCRIPTOR.fields)
    spec = validated_spec(message, DEFAULTS)
    assert spec.engine is EngineName.VLLM
    assert spec_message(spec) == message


def test_the_message_has_the_fields_of_the_specification() -> None:
    names = {field.name for field in pb.DeploymentSpec.DESCRIPTOR.fields}
    assert names == {field.name for field in fields(DeploymentSpec)}


def test_more_replicas_may_be_kept_than_there_are_by_default() -> None:
    message = pb.DeploymentSpec(name="tiny", min_replicas=7)
    assert validated_spec(message, DEFAULTS).max_replicas == 7


def test_less_replicas_at_most_than_at_least_are_refused() -> None:
    message = pb.DeploymentSpec(name="tiny", min_replicas=3, max_replicas=2)
    with pytest.raises(InvalidRequest, match="max_replicas 2 is less than min_replicas 3"):
        validated_spec(message, DEFAULTS)


@pytest.mark.parametrize("name", ["a", "0", "llama-3-8b", "a" * 63])
def test_names_that_may_be_used(name: str) -> None:
    assert validated_spec(pb.DeploymentSpec(name=name), DEFAULTS).name == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a_b", "a" * 64, "é", "a\n", "a/b"])
def test_names_that_may_not_be_used(name: str) -> None:
    with pytest.raises(InvalidRequest, match="Deployment name"):
        validated_spec(pb.DeploymentSpec(name=name), DEFAULTS)


@pytest.mark.parametrize("field", ["ttft_slo_s", "tpot_slo_s", "keep_alive_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_durations_must_be_finite_and_positive(field: str, value: float) -> None:
    message = pb.DeploymentSpec(name="tiny")
    setattr(message, field, value)
    with pytest.raises(InvalidRequest, match=f"{field} is .*finite number of seconds"):
        validated_spec(message, DEFAULTS)


def test_an_engine_that_we_do_not_know_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        validated_spec(pb.DeploymentSpec(name="tiny", engine="vlm"), DEFAULTS)
    assert str(caught.value) == "engine 'vlm' is not one of paraserve, vllm, tensorrt-llm."


def test_a_device_of_no_known_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="device 'tpu' is not one of cpu, cuda"):
        validated_spec(pb.DeploymentSpec(name="tiny", device="tpu"), DEFAULTS)


def test_a_good_checkpoint_becomes_a_deployment(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    deployment = read_deployment(make_spec(source=str(folder)))
    assert deployment.model.architecture == "LlamaForCausalLM"
    assert deployment.model.num_layers == 4
    assert len(deployment.index.tensors) == 4 * 9 + 3


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModel, "GPT2LMHeadModel is not supp"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            UnsupportedModel,
            "supported are .*LlamaFor",
        ),
        (
            {"num_hidden_layers": 5},
            InvalidCheckpoint,
            r"'num_hidden_layers' is 5, but the checkpoint has no tensors model\.layers\.4\.\*",
        ),
        ({"intermediate_size": 65}, InvalidCheckpoint, "has shape"),
        ({"without": "model.norm.weight"}, InvalidCheckpoint, "lacks the tensor 'model.norm"),
    ],
)
def test_checkpoints_we_cannot_run_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    folder = write_model(tmp_path / "model", **change)
    with pytest.raises(error, match=sentence):
        read_deployment(make_spec(source=str(folder)))


def test_absurd_counts_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", num_hidden_layers=10**8)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(InvalidCheckpoint, match="is 100000000, expected a whole number up to 1000"):
        read_deployment(make_spec(source=str(folder)))
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 5
    assert after.ru_maxrss - before.ru_maxrss < 100 << 10


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_head_is_part_of_what_is_deployed(tmp_path: Path, *, tied: bool) -> None:
    folder = write_model(tmp_path / "model", tie_word_embeddings=tied)
    deployment = read_deployment(make_spec(source=str(folder)))
    assert not deployment.model.tie_word_embeddings
    assert "lm_head.weight" in deployment.index.tensors


def test_the_type_of_the_weights_is_that_of_the_headers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", dtype=None)
    assert read_deployment(make_spec(source=str(folder))).model.dtype is Dtype.FLOAT32


def test_weights_of_integers_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    shard = folder / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"dtype": "F32"', b'"dtype": "I32"', 1))
    with pytest.raises(InvalidCheckpoint, match="has data type I32; weights are stored as one of"):
        read_deployment(make_spec(source=str(folder)))


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"has no tokenizer\.json"):
        read_deployment(make_spec(source=str(folder)))


def test_a_context_longer_than_the_model_allows_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(InvalidRequest, match="max_context 513 is more than the 512 tokens"):
        read_deployment(make_spec(source=str(folder), max_context=513))


def test_a_source_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_deployment(make_spec(source=str(tmp_path / "nowhere")))


def test_the_longest_token_is_learnt_when_a_model_is_deployed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert read_deployment(make_spec(source=str(folder))).longest_token_bytes == 0
    text = '{"model": {"unk_token": "?", "vocab": {"?": 0, "hello": 1}}}'
    (folder / "tokenizer.json").write_text(text)
    assert read_deployment(make_spec(source=str(folder))).longest_token_bytes == 5


def test_a_tokenizer_that_no_node_should_load_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(512 << 20)
    with pytest.raises(InvalidCheckpoint, match=r"^tokenizer\.json has 536870912 bytes"):
        read_deployment(make_spec(source=str(folder)))
