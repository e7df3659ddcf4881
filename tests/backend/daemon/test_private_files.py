from __future__ import annotations

import os
from pathlib import Path

import pytest

from paraserve_backend.daemon.private_files import write_private
from paraserve_backend.errors import InvalidRequest


def test_a_file_and_its_folder_are_only_their_users(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "tiny.1"
    write_private(path, "abc")
    assert path.read_text() == "abc"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_could_enter_is_closed_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    folder.chmod(0o755)
    write_private(folder / "tiny.1", "abc")
    assert folder.stat().st_mode & 0o777 == 0o700


def test_who_has_the_old_file_open_does_not_see_the_new_text(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "tiny.1"
    path.parent.mkdir()
    path.touch(0o666)
    with path.open(encoding="ascii") as old:
        write_private(path, "abc")
        assert old.read() == ""
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_link_in_its_place_is_replaced_and_what_it_names_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    path = tmp_path / "secrets" / "tiny.1"
    path.parent.mkdir()
    path.symlink_to(other)
    write_private(path, "abc")
    assert (other.read_text(), path.is_symlink()) == ("mine", False)


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "secrets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequest, match="no folder of ours"):
        write_private(tmp_path / "secrets" / "tiny.1", "abc")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    os.chown(tmp_path / "secrets", 65534, 65534)
    with pytest.raises(InvalidRequest, match="another user"):
        write_private(tmp_path / "secrets" / "tiny.1", "abc")
    assert list((tmp_path / "secrets").iterdir()) == []
