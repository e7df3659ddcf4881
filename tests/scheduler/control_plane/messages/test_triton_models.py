from __future__ import annotations

import json
from pathlib import PurePosixPath

import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from hypothesis import example, given
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from paraserve_backend.protocol.names import EngineName
from paraserve_backend.protocol.parameters import (
    GenerateConfig,
    LinkConfig,
    RoleConfig,
    SlotConfig,
    StageConfig,
    read_config,
)
from paraserve_backend.protocol.tensors import HAND_OVER_OUTPUTS, INPUTS, OUTPUTS, TensorSpec
from paraserve_backend.tritonserver.host.model_config import render
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan, has_whole_objects
from paraserve_scheduler.control_plane.messages.agents import part_message
from paraserve_scheduler.control_plane.messages.triton_models import TritonModel, stage_models
from paraserve_scheduler.reconciler.config import PlacementConfig
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.spec import ChannelKeys, Deployment
from tests.support.scheduler_records import lay_out_equally, make_deployment, make_space


def _plan(deployment: Deployment, stages: int, **space: object) -> ReplicaPlan:
    nodes = [
        make_space(
            f"n{index}", channel_host=f"10.0.0.{index}", free_ports=(9000 + index, 9100), **space
        )
        for index in range(stages)
    ]
    return lay_out_equally(deployment, 7, nodes, PlacementConfig())


def _config(model: TritonModel) -> ModelConfig:
    return text_format.Parse(model.files["config.pbtxt"].decode(), ModelConfig())


def _parameters(model: TritonModel) -> dict[str, str]:
    return {key: value.string_value for key, value in _config(model).parameters.items()}


def _by_name(models: tuple[TritonModel, ...]) -> dict[str, TritonModel]:
    return {model.name: model for model in models}


def _signature(model: TritonModel) -> tuple[list[str], list[str]]:
    config = _config(model)
    return [tensor.name for tensor in config.input], [tensor.name for tensor in config.output]


def _as_role_reads_it(model: TritonModel) -> RoleConfig:
    """What the backend makes of a rendered config, given to it as Triton gives it."""
    fields = MessageToDict(_config(model), preserving_proto_field_name=True)
    config = read_config(json.dumps(fields))
    assert not isinstance(config, SlotConfig)
    return config


def test_a_replica_of_one_stage_is_one_model_with_all_layers() -> None:
    deployment = make_deployment()
    plan = _plan(deployment, 1)
    (model,) = stage_models(plan, deployment.model, 0)
    assert model.name == "tiny.7"
    assert _parameters(model) == {
        "role": "generate",
        "deployment": "tiny",
        "replica": "tiny.7",
        "run_dir": "/run/n0",
        "fetch_id": "tiny.7.0",
        "engine": "paraserve",
        "hand_over": "tcp://10.0.0.0:9000",
        "key_file": "/run/n0/keys/tiny.7/curve.key",
        "device": "cpu",
        "kv_blocks": str(plan.kv_blocks),
        "block_size": "16",
        "max_context": "512",
        "max_sequences": "4",
        "max_batch_tokens": "512",
    }


def test_the_head_of_a_pipeline_has_four_models_and_the_others_one() -> None:
    deployment = make_deployment()
    plan = _plan(deployment, 3)
    names = [sorted(_by_name(stage_models(plan, deployment.model, i))) for i in range(3)]
    assert names == [
        ["tiny.7", "tiny.7.forward", "tiny.7.link", "tiny.7.stage0"],
        ["tiny.7.stage1"],
        ["tiny.7.stage2"],
    ]


def test_the_ensemble_is_loaded_after_its_steps() -> None:
    deployment = make_deployment()
    models = _by_name(stage_models(_plan(deployment, 2), deployment.model, 0))
    waves = {name: model.load_wave for name, model in models.items()}
    assert waves == {"tiny.7": 0, "tiny.7.stage0": 0, "tiny.7.link": 0, "tiny.7.forward": 1}


def test_generate_has_the_public_interface_and_streams() -> None:
    deployment = make_deployment()
    (model,) = stage_models(_plan(deployment, 1), deployment.model, 0)
    config = _config(model)
    assert config.backend == "paraserve"
    assert config.model_transaction_policy.decoupled
    assert [
        (tensor.name, DataType.Name(tensor.data_type), tuple(tensor.dims), tensor.optional)
        for tensor in config.input
    ] == [(spec.name, spec.config_datatype, spec.shape, spec.optional) for spec in INPUTS]
    assert [tensor.name for tensor in config.output] == [
        spec.name for spec in (*OUTPUTS, *HAND_OVER_OUTPUTS)
    ]


def test_tensors_of_a_forward_pass_fit_together() -> None:
    deployment = make_deployment()
    plan = _plan(deployment, 3)
    head = _by_name(stage_models(plan, deployment.model, 0))
    (middle,) = stage_models(plan, deployment.model, 1)
    (last,) = stage_models(plan, deployment.model, 2)
    assert _signature(head["tiny.7.stage0"]) == (["batch", "token_ids"], ["hidden"])
    assert _signature(head["tiny.7.link"]) == (["batch", "hidden"], ["result"])
    assert _signature(head["tiny.7.forward"]) == (["batch", "token_ids"], ["result"])
    assert _signature(middle) == (["batch", "hidden"], ["hidden"])
    assert _signature(last) == (["batch", "hidden"], ["result"])
    # Hidden states of 32 float32 numbers travel as 128 bytes a row.
    assert list(_config(middle).input[1].dims) == [-1, 128]


def test_the_ensemble_runs_the_heads_stage_and_then_the_link() -> None:
    deployment = make_deployment()
    forward = _by_name(stage_models(_plan(deployment, 2), deployment.model, 0))["tiny.7.forward"]
    config = _config(forward)
    assert config.platform == "ensemble"
    stage, link = config.ensemble_scheduling.step
    assert stage.model_name == "tiny.7.stage0"
    assert dict(stage.input_map) == {"batch": "batch", "token_ids": "token_ids"}
    assert dict(stage.output_map) == {"hidden": "hidden"}
    assert link.model_name == "tiny.7.link"
    assert dict(link.input_map) == {"batch": "batch", "hidden": "hidden"}
    assert dict(link.output_map) == {"result": "result"}


def test_the_channel_is_a_ring_through_all_nodes() -> None:
    deployment = make_deployment()
    plan = _plan(deployment, 3)
    link = _by_name(stage_models(plan, deployment.model, 0))["tiny.7.link"]
    stages = [stage_models(plan, deployment.model, stage)[0] for stage in (1, 2)]
    ring = [_parameters(model) for model in (link, *stages)]
    assert [hop["listen"] for hop in ring] == [
        # The head's first port is for hand-overs.
        "tcp://10.0.0.0:9100",
        "tcp://10.0.0.1:9001",
        "tcp://10.0.0.2:9002",
    ]
    assert [hop["next"] for hop in ring] == [hop["listen"] for hop in (*ring[1:], ring[0])]


def test_every_model_with_weights_or_a_channel_knows_its_keys() -> None:
    deployment = make_deployment()
    plan = _plan(deployment, 3)
    for stage in range(3):
        for model in stage_models(plan, deployment.model, stage):
            expected = "" if model.name.endswith(".forward") else f"/run/n{stage}/keys/tiny.7/"
            assert _parameters(model).get("key_file", "").startswith(expected)
            assert ("key_file" in _parameters(model)) is bool(expected)


def test_the_head_of_a_pipeline_takes_requests_over_too() -> None:
    deployment = make_deployment()
    head = _by_name(stage_models(_plan(deployment, 2), deployment.model, 0))
    assert _parameters(head["tiny.7"])["hand_over"] == "tcp://10.0.0.0:9000"


def test_every_role_can_read_the_config_rendered_for_it() -> None:
    deployment = make_deployment()
    plan = _plan(deployment, 2)
    models = _by_name(
        (*stage_models(plan, deployment.model, 0), *stage_models(plan, deployment.model, 1))
    )
    front = _as_role_reads_it(models["tiny.7"])
    assert isinstance(front, GenerateConfig)
    assert (front.forward_model, front.batches_in_flight) == ("tiny.7.forward", 2)
    assert front.kv.num_blocks == plan.kv_blocks
    first = _as_role_reads_it(models["tiny.7.stage0"])
    assert isinstance(first, StageConfig)
    assert (first.layers, first.channel) == (plan.stages[0].layers, None)
    second = _as_role_reads_it(models["tiny.7.stage1"])
    assert isinstance(second, StageConfig)
    assert second.channel is not None
    assert second.layers == plan.stages[1].layers
    link = _as_role_reads_it(models["tiny.7.link"])
    assert isinstance(link, LinkConfig)
    assert link.forward_timeout_s == plan.forward_timeout_s


@pytest.mark.parametrize(
    ("device", "kind", "gpus"),
    [
        ("cpu", ModelInstanceGroup.KIND_CPU, []),
        ("cuda:1", ModelInstanceGroup.KIND_GPU, [1]),
    ],
)
def test_instances_run_on_the_planned_device(
    device: str, kind: ModelInstanceGroup.Kind.ValueType, gpus: list[int]
) -> None:
    deployment = make_deployment()
    (model,) = stage_models(_plan(deployment, 1, device=device), deployment.model, 0)
    (group,) = _config(model).instance_group
    assert (group.count, group.kind, list(group.gpus)) == (1, kind, gpus)


def test_every_model_has_a_version_folder() -> None:
    deployment = make_deployment()
    for model in stage_models(_plan(deployment, 2), deployment.model, 0):
        assert any(PurePosixPath(path).parts[0] == "1" for path in model.files)


@given(st.text())
@example('"} }')
@example("back\\slash")
@example("line\nbreak")
@example("é")
def test_a_value_cannot_break_out_of_its_place(value: str) -> None:
    def config(value: str) -> ModelConfig:
        text = render(
            "link",
            name=f"d{value}",
            inputs=(TensorSpec(name=f"batch{value}", datatype="UINT8", shape=(-1,)),),
            outputs=(),
            parameters={"run_dir": value, f"role{value}": "link"},
            device="cpu",
        )
        return text_format.Parse(text.decode("ascii"), ModelConfig())

    found = config(value)
    assert (found.name, found.input[0].name) == (f"d{value}", f"batch{value}")
    assert {key: it.string_value for key, it in found.parameters.items()} == {
        "run_dir": value,
        f"role{value}": "link",
    }
    # Nothing else depends on it.
    plain = config("")
    for field in ("name", "input", "parameters"):
        found.ClearField(field)
        plain.ClearField(field)
    assert found == plain


def test_the_standalone_template_has_the_public_interface() -> None:
    text = _template_text("standalone")
    config = text_format.Parse(text, ModelConfig())
    assert [
        (tensor.name, DataType.Name(tensor.data_type), tuple(tensor.dims), tensor.optional)
        for tensor in config.input
    ] == [(spec.name, spec.config_datatype, spec.shape, spec.optional) for spec in INPUTS]
    assert [
        (tensor.name, DataType.Name(tensor.data_type), tuple(tensor.dims))
        for tensor in config.output
    ] == [(spec.name, spec.config_datatype, spec.shape) for spec in OUTPUTS]
    fields = MessageToDict(config, preserving_proto_field_name=True)
    settings = read_config(json.dumps(fields))
    assert isinstance(settings, GenerateConfig)
    assert settings.weights.source == "/models/llama"


def _template_text(name: str) -> str:
    from importlib import resources

    folder = resources.files("paraserve_backend.tritonserver.host") / "templates"
    return (folder / f"{name}.pbtxt").read_text(encoding="utf-8")


def test_another_engine_computes_in_full_instances_only() -> None:
    deployment = make_deployment(engine=EngineName.VLLM)
    pipeline, whole = _plan(deployment, 2), _plan(deployment, 1)
    assert (pipeline.engine, whole.engine) == (EngineName.PARASERVE, EngineName.VLLM)
    (model,) = stage_models(whole, deployment.model, 0)
    role = _as_role_reads_it(model)
    assert isinstance(role, GenerateConfig)
    assert role.engine == "vllm"
    # It takes no KV blocks, so nobody is told where to send them.
    assert pipeline.inbox_url == pipeline.hand_over.url
    assert whole.inbox_url == ""


def test_another_engine_gets_whole_files() -> None:
    deployment = make_deployment(engine=EngineName.VLLM)
    keys = ChannelKeys(public_key="p", secret_key="s")
    for stages, is_whole in ((1, True), (2, False)):
        part = part_message(deployment, _plan(deployment, stages), 0, keys)
        assert has_whole_objects(FetchPlan.from_json(part.fetch.plan_json)) is is_whole
