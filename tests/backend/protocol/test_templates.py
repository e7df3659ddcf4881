from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc.model_config_pb2 import ModelConfig

from paraserve_backend.protocol.engine_abilities import ABILITIES
from paraserve_backend.protocol.parameters import GenerateConfig, read_config

TEMPLATES = Path(__file__).resolve().parents[3] / "model_repository_templates"


def parsed(name: str) -> ModelConfig:
    return text_format.Parse((TEMPLATES / f"{name}.pbtxt").read_text(), ModelConfig())


@pytest.mark.parametrize("engine", ABILITIES)
def test_an_engines_template_is_the_standalone_one_but_for_the_engine(engine: str) -> None:
    config, standalone = parsed(engine.replace("-", "_")), parsed("standalone")
    assert list(config.input) == list(standalone.input)
    assert list(config.output) == list(standalone.output)
    assert config.parameters["engine"].string_value == engine
    assert set(config.parameters) >= {"engine", *standalone.parameters}
    settings = read_config(json.dumps(MessageToDict(config, preserving_proto_field_name=True)))
    assert isinstance(settings, GenerateConfig)
    assert settings.weights.source == "/models/llama"
