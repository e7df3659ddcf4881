from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from paraserve_backend.engines.entry_points import GROUP, make_engine
from paraserve_backend.engines.vllm.engine import VllmEngine
from paraserve_backend.errors import InvalidRequest, Unavailable
from paraserve_backend.protocol.names import EngineName
from tests.support.engine_packages import write_engine_package

REPOSITORY = Path(__file__).resolve().parents[3]
_BAD_MODULE = """
from paraserve_backend.errors import Unavailable

def refuse():
    raise Unavailable("No GPU is free.")

def fail():
    raise RuntimeError("no licence")
"""


def offered_here() -> dict[str, str]:
    """What this package's own pyproject.toml offers."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    offered: dict[str, str] = project["entry-points"][GROUP]
    return offered


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def own(packages: Path) -> None:
    """Our own package as pip would install it; what is installed here may be older."""
    write_engine_package(packages, "paraserve", offered_here())


def test_every_engine_a_deployment_may_name_is_offered() -> None:
    offered = offered_here()
    assert set(offered) == set(EngineName) - {EngineName.PARASERVE}
    for name, value in offered.items():
        made = EntryPoint(name=name, value=value, group=GROUP).load()()
        assert made.abilities.name == name


@pytest.mark.usefixtures("own")
def test_an_engine_is_found_by_its_name() -> None:
    assert isinstance(make_engine("vllm"), VllmEngine)


@pytest.mark.usefixtures("own")
def test_another_package_can_offer_one(packages: Path) -> None:
    (packages / "my_engine.py").write_text("class Mine: pass\n")
    write_engine_package(packages, "my-package", {"mine": "my_engine:Mine"})
    assert type(make_engine("mine")).__name__ == "Mine"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", ["os:system", "", "VLLM", "paraserve"])
def test_an_unknown_engine_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        make_engine(name)
    known = "paraserve, tensorrt-llm, vllm"
    assert str(refused.value) == f"Parameter 'engine' is {name!r}; use one of {known}."


@pytest.mark.usefixtures("own")
def test_two_packages_with_one_name_are_refused(packages: Path) -> None:
    write_engine_package(packages, "other", {"vllm": "other_engine:Engine"})
    with pytest.raises(InvalidRequest, match="'vllm': other, paraserve; uninstall all but one"):
        make_engine("vllm")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:Engine", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("bad_engine:Missing", "AttributeError: module 'bad_engine' has no attribute 'Missing'"),
        ("bad_engine:fail", "RuntimeError: no licence"),
        ("bad_engine", "TypeError: 'module' object is not callable"),
    ],
)
def test_a_broken_entry_point_is_one_sentence(packages: Path, value: str, reason: str) -> None:
    (packages / "bad_engine.py").write_text(_BAD_MODULE)
    write_engine_package(packages, "bad", {"mine": value})
    with pytest.raises(InvalidRequest) as refused:
        make_engine("mine")
    assert str(refused.value) == (
        f"The engine 'mine' of package bad cannot be made from {value} ({reason}); "
        "repair that package."
    )


def test_what_an_engine_says_itself_is_passed_on(packages: Path) -> None:
    (packages / "bad_engine.py").write_text(_BAD_MODULE)
    write_engine_package(packages, "bad", {"mine": "bad_engine:refuse"})
    with pytest.raises(Unavailable, match="No GPU is free"):
        make_engine("mine")


def test_no_engine_is_imported_before_a_model_asks_for_it() -> None:
    code = (
        "import sys, paraserve_backend.roles.external; "
        "print([name for name in sys.modules "
        "if name.startswith(('paraserve_backend.engines.vllm', "
        "'paraserve_backend.engines.tensorrt_llm'))])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
