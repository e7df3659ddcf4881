from __future__ import annotations

from pathlib import Path

import pytest

from paraserve_backend.channel.keys import KeyStore
from paraserve_backend.errors import AlreadyExists, InvalidRequest
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.tritonserver.host.repository import ModelRepository, check_name


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".paraserve"
    }


def test_a_model_is_written_whole_and_removed_whole(tmp_path: Path) -> None:
    repository = ModelRepository(tmp_path)
    files = {"config.pbtxt": b"name", "1/none": b"", "a/b/c.json": b"{}"}
    repository.write("tiny.1", files)
    assert files_of(tmp_path / "tiny.1") == files
    assert repository.ours() == ("tiny.1",)
    repository.remove("tiny.1")
    assert list(tmp_path.iterdir()) == []
    repository.remove("tiny.1")


def test_writing_again_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    repository = ModelRepository(tmp_path)
    repository.write("tiny.1", {"old": b""})
    repository.write("tiny.1", {"new": b""})
    assert files_of(tmp_path / "tiny.1") == {"new": b""}


def test_somebody_elses_model_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    repository = ModelRepository(tmp_path)
    with pytest.raises(AlreadyExists, match=r"theirs that is not ParaServe's"):
        repository.write("theirs", {"config.pbtxt": b""})
    repository.remove("theirs")
    assert repository.ours() == ()
    assert (tmp_path / "theirs").is_dir()


def test_what_was_left_half_written_is_no_model_and_can_be_removed(tmp_path: Path) -> None:
    half = tmp_path / ".new-tiny.1"
    half.mkdir()
    (half / ".paraserve").touch()
    (tmp_path / "theirs").mkdir()
    repository = ModelRepository(tmp_path)
    assert repository.ours() == ()
    repository.remove_unfinished()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../up", "a/../../up", "", "a//b", "./a", "a/.", ".paraserve", "a\0b"]
)
def test_a_file_outside_the_models_folder_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not inside its folder"):
        ModelRepository(tmp_path / "models").write("tiny.1", {path: b""})
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "A", "a..b", "-a", "a b", "ä", "a\n"])
def test_a_name_that_is_not_plain_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot name a model"):
        check_name(name)


def test_keys_lie_in_a_file_only_their_user_can_read(tmp_path: Path) -> None:
    keys = KeyStore(RunDir(tmp_path))
    for secret in ("first", "second"):
        keys.write("tiny.1", pb.ChannelKeys(public_key="public", secret_key=secret))
    path = tmp_path / "keys" / "tiny.1" / "curve.key"
    assert path.read_text() == "public\nsecond\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    keys.remove("tiny.1")
    keys.remove("tiny.1")
    assert list((tmp_path / "keys").iterdir()) == []
