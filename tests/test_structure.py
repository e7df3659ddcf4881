"""The shape of the code: small folders, names and decisions made once, a map that is complete."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MAP = REPOSITORY / "docs" / "structure.md"
PACKAGES = (
    REPOSITORY / "backend" / "paraserve_backend",
    REPOSITORY / "scheduler" / "paraserve_scheduler",
)
_MOST_AT_ROOT = 3
_MOST_IN_FOLDER = 16
#: What only one module may write, and that module.
_ONCE = {
    "a gRPC option": (r"""["']grpc\.""", "paraserve_backend/rpc/channels.py"),
    "a gRPC channel or server": (
        r"secure_channel\(|aio\.server\(",
        "paraserve_backend/rpc/channels.py",
    ),
    "a log format": (r"basicConfig\(", "paraserve_backend/daemon/logs.py"),
}
_MAP_LINE = re.compile(r"^- `(paraserve_\w+/[\w/]+\.py)`: (\S.*)$", re.MULTILINE)


def modules(package: Path) -> Iterator[Path]:
    """The modules that somebody wrote and that hold something."""
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py" and "_pb2" not in path.name:
            yield path


def public_classes(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls_of_begin(path: Path) -> Iterator[ast.Call]:
    """Calls of `state.begin.begin`, under whatever name it was imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "paraserve_scheduler.state.begin"
        for alias in node.names
        if alias.name == "begin"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            is_function = isinstance(node.func, ast.Name) and node.func.id in names
            is_attribute = ast.unparse(node.func).endswith("begin.begin")
            if is_function or is_attribute:
                yield node


def takes(function: ast.FunctionDef | ast.AsyncFunctionDef, kind: str) -> bool:
    """Whether an argument is annotated with this type, or with it or None."""
    arguments = function.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return any(
        kind in ast.unparse(argument.annotation).split(" | ")
        for argument in every
        if argument.annotation is not None
    )


def name_of(path: Path, package: Path) -> str:
    """The path as docs/structure.md writes it, from the package on."""
    return path.relative_to(package.parent).as_posix()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_packages_root_has_hardly_any_modules(package: Path) -> None:
    flat = [path.name for path in modules(package) if path.parent == package]
    assert len(flat) <= _MOST_AT_ROOT, f"{flat}: give them a folder"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_folder_is_a_heap(package: Path) -> None:
    by_folder: dict[Path, list[str]] = defaultdict(list)
    for path in modules(package):
        by_folder[path.parent].append(path.name)
    heaps = {
        folder.name: len(names)
        for folder, names in by_folder.items()
        if len(names) > _MOST_IN_FOLDER
    }
    assert not heaps, f"more than {_MOST_IN_FOLDER} modules in one folder"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_package_is_empty(package: Path) -> None:
    """A name for later is reserved in docs/structure.md, not by an empty folder."""
    full = {parent for path in modules(package) for parent in path.parents}
    assert {path.parent for path in package.rglob("__init__.py")} <= full


def test_no_public_class_name_is_defined_twice() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in modules(package):
            for name in public_classes(path):
                homes[name].append(name_of(path, package))
    assert not {name: places for name, places in homes.items() if len(places) > 1}


@pytest.mark.parametrize("what", _ONCE)
def test_what_is_decided_once_is_written_in_its_module_only(what: str) -> None:
    pattern, home = _ONCE[what]
    found = {
        name_of(path, package)
        for package in PACKAGES
        for path in modules(package)
        if re.search(pattern, path.read_text(encoding="utf-8"))
    }
    assert found == {home}, f"{what} belongs to {home}"


def test_no_function_takes_both_a_view_and_a_time() -> None:
    """A decision is a `Turn`, which has both; an event and a begun action have their own time."""
    offenders = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in modules(PACKAGES[1])
        for node in functions(path)
        if takes(node, "ClusterView") and takes(node, "float")
    ]
    assert not offenders


def test_an_action_is_begun_in_two_places() -> None:
    """Where it is decided on, and where it is carried out."""
    callers = [path.name for path in modules(PACKAGES[1]) for _ in calls_of_begin(path)]
    assert sorted(callers) == ["loop.py", "turn.py"]


def test_every_module_has_its_line_in_the_map_and_every_line_its_module() -> None:
    lines = [name for name, _ in _MAP_LINE.findall(MAP.read_text(encoding="utf-8"))]
    assert len(lines) == len(set(lines)), "a module has two lines"
    there = {name_of(path, package) for package in PACKAGES for path in modules(package)}
    assert set(lines) - there == set(), "lines without a module"
    assert there - set(lines) == set(), "modules without a line"
