"""Who may use our folders and files: nobody but us, whatever was there before."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paraserve_backend.channel.keys import KeyStore
from paraserve_backend.daemon.private_files import (
    create_file,
    make_folder,
    own_folder,
    write_private,
)
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import Span, SpanFile, SpanName
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.disk_format import aligned_buffer
from paraserve_backend.weights.tiers.layout import OBJECTS
from paraserve_backend.weights.tiers.memory import Tier
from tests.support.checkpoints import land, make_plan, write_checkpoint

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): oct(stat.S_IMODE(path.lstat().st_mode))
        for path in (folder, *folder.rglob("*"))
    }


def assert_private(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        found = path.lstat()
        expected = 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
        assert stat.S_IMODE(found.st_mode) == expected, path
        assert found.st_uid == os.geteuid()


def fill(tmp_path: Path) -> Tier:
    """Leave in a tier what a node leaves there: a fetch, a released one, spans."""
    model = write_checkpoint(tmp_path / "model")
    tier = Tier.open(tmp_path / "run" / "tier", cache_bytes=1 << 30)
    for number in (1, 2):
        fetch = tier.begin(make_plan(model, fetch_id=f"tiny.{number}.0"))
        land(fetch, model)
        fetch.finish()
    span = Span(name=SpanName.FETCH, start_s=0, end_s=1)
    SpanFile(tier.directory / "fetches" / "tiny.1.0" / "spans.jsonl").append(span)
    tier.release("tiny.2.0")
    return tier


@pytest.mark.usefixtures("umask")
def test_a_node_leaves_nothing_that_others_can_read(tmp_path: Path) -> None:
    tier = fill(tmp_path)
    keys = pb.ChannelKeys(public_key="p", secret_key="s")
    KeyStore(RunDir(tmp_path / "run")).write("tiny.1", keys)
    disk = DiskTier.open(tmp_path / "disk", disk_bytes=1 << 30)
    for found in tier.contents(with_files=True):
        assert disk.save(found, (0, 8), aligned_buffer(), lambda _: ())
    disk.close()
    tier.close()
    assert_private(tmp_path / "run")
    assert_private(tmp_path / "disk")


def test_what_an_earlier_version_left_open_is_closed(tmp_path: Path) -> None:
    fill(tmp_path).close()
    tier_dir = tmp_path / "run" / "tier"
    for path in (tier_dir, *tier_dir.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    Tier.open(tier_dir, cache_bytes=1 << 30).close()
    assert_private(tier_dir)


LEVELS = ("run", "run/tier", "run/tier/objects", "run/tier/fetches", "run/tier/cache")


@needs_root
@pytest.mark.parametrize("level", LEVELS)
def test_a_folder_that_somebody_else_made_first_is_refused(tmp_path: Path, level: str) -> None:
    for parent in (*reversed((tmp_path / level).parents), tmp_path / level):
        parent.mkdir(exist_ok=True, mode=0o700)
    os.chown(tmp_path / level, NOBODY, NOBODY)
    with pytest.raises(InvalidRequest, match=f"{level} belongs to user {NOBODY}, not to us"):
        Tier.open(tmp_path / "run" / "tier")


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("target", ["there", "gone"])
def test_a_link_in_place_of_a_folder_is_refused(tmp_path: Path, level: str, target: str) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    path = tmp_path / level
    for parent in reversed(path.parents):
        parent.mkdir(exist_ok=True, mode=0o700)
    path.symlink_to(tmp_path / target)
    with pytest.raises((InvalidRequest, OSError)):
        Tier.open(tmp_path / "run" / "tier")
    assert list(tmp_path.glob("there/*")) == []
    assert not (tmp_path / "gone").exists()


def _link(path: Path, precious: Path) -> None:
    path.symlink_to(precious)


def _hard_link(path: Path, precious: Path) -> None:
    path.hardlink_to(precious)


@pytest.mark.parametrize("plant", [_link, _hard_link])
def test_a_file_of_ours_that_somebody_named_as_an_object_is_not_written_to(
    tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"do not touch")
    precious.chmod(0o640)
    model = write_checkpoint(tmp_path / "model")
    plan = make_plan(model)
    tier = Tier.open(tmp_path / "tier")
    name = next(iter(tier.begin(plan).object_names))
    tier.close()
    objects = tmp_path / "tier" / OBJECTS
    (objects / name).unlink()
    objects.chmod(0o777)  # as it was when somebody could
    plant(objects / name, precious)
    with pytest.raises(InvalidRequest, match="is a link or no plain file"):
        Tier.open(tmp_path / "tier")
    assert precious.read_bytes() == b"do not touch"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o640


def test_no_file_is_ever_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for at_most_one in (True, False):
        with pytest.raises(OSError, match="link"):
            create_file(tmp_path / "link", at_most_one=at_most_one)
    assert not (tmp_path / "target").exists()


def test_a_folder_that_others_may_write_to_is_no_place_for_ours(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(InvalidRequest, match="Other users may write to "):
        own_folder(shared / "ours", entries=())
    shared.chmod(0o1777)  # as /dev/shm: nobody can rename what is another's
    own_folder(shared / "ours", entries=())
    assert modes(shared / "ours") == {".": "0o700"}


@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_a_folder_that_is_for_other_things_too_stays_as_it_is(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "others.txt").write_text("")
    shared.chmod(mode)
    with pytest.raises(InvalidRequest, match=r"is for other things, too \(others.txt\)"):
        own_folder(shared, entries=("tier",))
    assert stat.S_IMODE(shared.stat().st_mode) == mode


def test_a_disk_is_used_at_its_mount_point(tmp_path: Path) -> None:
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "disk").chmod(0o755)
    DiskTier.open(tmp_path / "disk", disk_bytes=1).close()
    assert stat.S_IMODE((tmp_path / "disk").stat().st_mode) == 0o700


def test_a_link_of_ours_on_the_way_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "there")
    own_folder(tmp_path / "way" / "ours", entries=())
    assert modes(tmp_path / "there" / "ours") == {".": "0o700"}


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="file is no folder"):
        make_folder(tmp_path / "file")
    with pytest.raises(InvalidRequest, match="file is no folder"):
        own_folder(tmp_path / "file" / "ours", entries=())


# ---- files with secrets ----


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
    with pytest.raises(InvalidRequest, match="is no folder"):
        write_private(tmp_path / "secrets" / "tiny.1", "abc")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    os.chown(tmp_path / "secrets", 65534, 65534)
    with pytest.raises(InvalidRequest, match="belongs to user"):
        write_private(tmp_path / "secrets" / "tiny.1", "abc")
    assert list((tmp_path / "secrets").iterdir()) == []
