from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from paraserve_backend.daemon.settings import load_config, parse_arguments, read_token
from paraserve_backend.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    port: int = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """A house."""

    name: str
    height_m: float = 2.0
    rooms: int | None = None
    is_open: bool = False
    folder: Path = Path("/house")
    owners: tuple[str, ...] = ()
    door: Door = Door()
    garden: Mapping[str, object] = field(default_factory=dict)


def write(folder: Path, text: str) -> Path:
    path = folder / "house.yaml"
    path.write_text(text)
    return path


def test_a_file_gives_every_kind_of_setting(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name: hut\nheight_m: 3\nrooms: 2\nis_open: true\nfolder: /tmp\n"
        "owners: [ann, bob]\ndoor:\n  port: 81\ngarden: {trees: [2]}\n",
    )
    assert load_config(House, path) == House(
        name="hut",
        height_m=3.0,
        rooms=2,
        is_open=True,
        folder=Path("/tmp"),
        owners=("ann", "bob"),
        door=Door(port=81),
        garden={"trees": [2]},
    )


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "name: hut\nrooms: 2\nheight_m: 4.5\n")
    argv = [f"--config={path}", "--rooms=7", "--owners=[ann]", "--is-open", "yes"]
    house = parse_arguments(House, argv, program="house")
    assert house == House(name="hut", rooms=7, owners=("ann",), is_open=True, height_m=4.5)


def test_text_flags_are_taken_as_they_are() -> None:
    assert parse_arguments(House, ["--name=12", "--folder=1.5"], program="house") == House(
        name="12", folder=Path("1.5")
    )


def test_null_is_allowed_only_where_the_setting_is_optional(tmp_path: Path) -> None:
    assert load_config(House, write(tmp_path, "name: hut\nrooms: null\n")).rooms is None
    with pytest.raises(
        InvalidRequest, match=r"'height_m' .* takes a finite number of at least 0, not None"
    ):
        load_config(House, write(tmp_path, "name: hut\nheight_m: null\n"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: hut\nrroms: 2\n", "Unknown setting 'rroms' in .*; did you mean 'rooms'?"),
        ("name: hut\ndoor: {prt: 2}\n", "Unknown setting 'door.prt' .* 'door.port'?"),
        ("rooms: 2\n", "Setting 'name' is missing from"),
        ("", "Setting 'name' is missing from"),
        ("name: hut\nrooms: two\n", "'rooms' .* takes a whole number of at least 0, not 'two'"),
        ("name: hut\nrooms: true\n", "'rooms' .* takes a whole number of at least 0, not True"),
        ("name: hut\nis_open: 1\n", "'is_open' .* takes true or false, not 1"),
        ("name: hut\nrooms: -1\n", "'rooms' .* takes a whole number of at least 0, not -1"),
        ("name: hut\nheight_m: high\n", "takes a finite number of at least 0, not 'high'"),
        ("name: hut\nheight_m: .nan\n", "takes a finite number of at least 0, not nan"),
        ("name: hut\nheight_m: .inf\n", "takes a finite number of at least 0, not inf"),
        ("name: hut\nheight_m: -0.5\n", "takes a finite number of at least 0, not -0.5"),
        (f"name: hut\nheight_m: 1{'0' * 400}\n", "takes a finite number of at least 0"),
        ("name: hut\ndoor: {8: 2}\n", "Unknown setting 'door.8' .* 'door.port'?"),
        ("name: hut\nrooms: 2\nrooms: 3\n", "the key 'rooms' is there twice in line 3"),
        ("name: hut\nowners: ann\n", "'owners' .* takes a list"),
        ("name: hut\nowners: [1]\n", r"'owners\[0\]' .* takes text"),
        ("name: hut\ndoor: 3\n", "'door' .* settings of its own"),
        ("name: 3\n", "'name' .* takes text"),
        ("name: [hut\n", "not valid YAML: .* in line"),
        ("- name\n", "must hold settings as key: value lines"),
    ],
)
def test_a_mistake_is_named_with_its_key(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        load_config(House, write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"Cannot read .*none\.yaml: No such file"):
        load_config(House, tmp_path / "none.yaml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "house.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match=r"house\.yaml is not valid YAML: it is not UTF-8"):
        load_config(House, path)


def test_broken_yaml_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_config(House, write(tmp_path, "name: [s3cret\n"))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "environ", "token"),
    [
        ("from-file\n", {"PARASERVE_TOKEN": "from-environment"}, "from-file"),
        (None, {"PARASERVE_TOKEN": "from-environment"}, "from-environment"),
        (None, {"PARASERVE_TOKEN": ""}, None),
        (None, {}, None),
    ],
)
def test_the_token_comes_from_the_file_then_the_environment(
    content: str | None, environ: Mapping[str, str], token: str | None, tmp_path: Path
) -> None:
    path = None
    if content is not None:
        path = tmp_path / "token"
        path.write_text(content)
    assert read_token(path, environ) == token


def test_an_empty_or_missing_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="Cannot read token_file"):
        read_token(tmp_path / "token", {"PARASERVE_TOKEN": "x"})
    (tmp_path / "token").write_text("\n")
    with pytest.raises(InvalidRequest, match="is empty"):
        read_token(tmp_path / "token", {"PARASERVE_TOKEN": "x"})
