from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from paraserve_backend.errors import (
    AccessDenied,
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
    ParaServeError,
    SourceUnavailable,
)
from paraserve_backend.weights.sources.base import Source, StoredObject
from paraserve_backend.weights.sources.open import Sources, open_source
from paraserve_backend.weights.sources.retry import read_range
from tests.support.stores import (
    BUCKET,
    SECRET_KEY,
    ScriptedStore,
    Step,
    as_status,
    make_certificate,
    rclone_store,
    refuse,
    serve,
    whole_object,
    with_header,
)

CONTENT = bytes(range(256)) * 8


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / BUCKET
    (folder / "tiny" / "nested").mkdir(parents=True)
    (folder / "tiny" / "weights.bin").write_bytes(CONTENT)
    (folder / "tiny" / "config.json").write_text("{}")
    (folder / "tiny" / "nested" / "other.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def endpoint(bucket: Path) -> Iterator[str]:
    with rclone_store(bucket.parent) as url:
        yield url


@contextmanager
def scripted_source(*script: Step) -> Iterator[tuple[Source, ScriptedStore]]:
    store = ScriptedStore({"tiny/weights.bin": CONTENT})
    store.script.extend(script)
    with serve(store) as url:
        yield open_source(f"s3://{BUCKET}/tiny", endpoint_url=url), store


def only_object(source: Source) -> StoredObject:
    (stored,) = source.list()
    return stored


def test_a_folder_lists_its_files_and_no_folders_by_key(bucket: Path) -> None:
    listed = open_source(str(bucket / "tiny")).list()
    assert [(stored.key, stored.size_bytes) for stored in listed] == [
        ("config.json", 2),
        ("weights.bin", len(CONTENT)),
    ]


def test_a_folder_may_be_a_file_uri_and_hold_links_within_itself(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "1").write_bytes(CONTENT)
    (folder / "weights.bin").symlink_to("files/1")
    (folder / "gone").symlink_to("nowhere")
    source = open_source(folder.as_uri())
    assert read_range(source, only_object(source), 3, 700) == CONTENT[3:700]


def hub_snapshot(cache: Path, repository: str = "models--a--b") -> Path:
    """Make what the Hugging Face hub's cache is: folders of links to files beside them."""
    snapshot = cache / repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / repository / "blobs").mkdir()
    (cache / repository / "blobs" / "89ab").write_bytes(CONTENT)
    (snapshot / "weights.bin").symlink_to("../../blobs/89ab")
    return snapshot


def test_a_snapshot_of_a_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    (tmp_path / "latest").symlink_to(snapshot)  # the name of the folder itself may be a link
    for folder in (snapshot, tmp_path / "latest"):
        source = open_source(str(folder))
        assert read_range(source, only_object(source)) == CONTENT


def _link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def _link_twice(path: Path, secret: Path) -> None:
    hop = path.with_name("hop")
    hop.unlink(missing_ok=True)
    hop.symlink_to(secret.parent, target_is_directory=True)
    path.symlink_to(f"hop/{secret.name}")


def _link_upwards(path: Path, secret: Path) -> None:
    path.symlink_to(os.path.relpath(secret, path.parent))


def _link_through_proc(path: Path, secret: Path) -> None:
    path.symlink_to(f"/proc/self/root{secret}")


_LINKS = [_link, _link_twice, _link_upwards, _link_through_proc]


@pytest.mark.parametrize("plant", _LINKS)
@pytest.mark.parametrize("place", ["model", "repo/snapshots/0123", "models--a--b/snapshots/0123"])
def test_no_file_is_read_through_a_link_that_leaves_the_folder(
    tmp_path: Path, plant: Callable[[Path, Path], None], place: str
) -> None:
    secret, folder = tmp_path / "repo" / "secret", tmp_path / place
    folder.mkdir(parents=True)
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("only root may read this")
    (folder / "config.json").write_text("{}")
    source = open_source(str(folder))
    (config,) = source.list()
    plant(folder / "tokenizer.json", secret)
    with pytest.raises(AccessDenied, match=r"tokenizer.json in .* is a link that leaves"):
        source.list()
    # Nor where the link is put there once the listing has been made.
    connection = source.connect()
    (folder / "config.json").unlink()
    plant(folder / "config.json", secret)
    with pytest.raises(AccessDenied, match="leaves the folder"):
        connection.read_into(config, 0, memoryview(bytearray(2)))


def test_what_is_no_plain_file_is_neither_listed_nor_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "terminal").symlink_to("/dev/null")
    source = open_source(str(tmp_path))
    config = only_object(source)
    fifo = replace(config, key="tokenizer.json")
    with pytest.raises(SourceUnavailable):
        source.connect().read_into(fifo, 0, memoryview(bytearray(2)))


def test_folders_are_read_below_the_roots_only(tmp_path: Path) -> None:
    roots = (tmp_path / "models", tmp_path / "more")
    for folder in (roots[0] / "tiny", roots[1], tmp_path / "else"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (roots[0] / "way-out").symlink_to(tmp_path / "else")
    (tmp_path / "models-too").mkdir()
    sources = Sources(roots=roots)
    for folder in (roots[0] / "tiny", roots[1]):
        source = sources.open(str(folder))
        assert read_range(source, only_object(source)) == b"{}"
    for name in ("else", "nowhere", "models/../else", "models/way-out", "models-too"):
        source = sources.open((tmp_path / name).as_uri())
        with pytest.raises(AccessDenied, match=r"in none of the source_roots: .*models, .*more"):
            source.list()
        config = StoredObject(key="config.json", size_bytes=2, version="1")
        with pytest.raises(AccessDenied, match="is in none of the source_roots"):
            source.connect().read_into(config, 0, memoryview(bytearray(2)))


@pytest.mark.parametrize(
    "uri",
    ["", "model", "./model", "ftp://host/model", "s3:///prefix", "s3://b?x", "s3://[b", "/a\0b"],
)
def test_a_uri_of_another_form_is_refused(uri: str) -> None:
    with pytest.raises(InvalidRequest):
        open_source(uri)


def test_a_missing_or_empty_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        open_source(str(tmp_path / "none")).list()
    with pytest.raises(NotFound, match="holds no files"):
        open_source(str(tmp_path)).list()


def test_a_folder_that_cannot_be_looked_at_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match=r"cannot read model folder .*: File name too long"):
        open_source(str(tmp_path / ("x" * 300))).list()


def test_a_file_replaced_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    source = open_source(str(tmp_path))
    stored = only_object(source)
    path.write_bytes(b"new")
    os.utime(path, (0, 0))
    with pytest.raises(InvalidCheckpoint, match="changed"):
        read_range(source, stored)


@pytest.mark.usefixtures("aws_environment")
class TestRealStore:
    @pytest.mark.parametrize("prefix", ["tiny", "tiny/", "/tiny"])
    def test_lists_and_reads_what_is_directly_below_the_prefix(
        self, endpoint: str, prefix: str
    ) -> None:
        source = open_source(f"s3://{BUCKET}/{prefix}", endpoint_url=endpoint)
        config, weights = source.list()
        assert (config.key, weights.key) == ("config.json", "weights.bin")
        assert read_range(source, weights) == CONTENT
        assert read_range(source, weights, 5, 1029) == CONTENT[5:1029]
        assert read_range(source, config) == b"{}"

    def test_takes_the_endpoint_from_the_environment(
        self, endpoint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert len(open_source(f"s3://{BUCKET}/tiny").list()) == 2

    def test_an_object_replaced_since_it_was_listed_is_not_read(
        self, endpoint: str, bucket: Path
    ) -> None:
        path = bucket / "replaced" / "weights.bin"
        path.parent.mkdir()
        path.write_bytes(b"old!")
        source = open_source(f"s3://{BUCKET}/replaced", endpoint_url=endpoint)
        stored = only_object(source)
        path.write_bytes(b"longer")
        with pytest.raises(InvalidCheckpoint, match="changed"):
            read_range(source, stored)

    @pytest.mark.parametrize("uri", ["s3://no-such-bucket/tiny", f"s3://{BUCKET}/none"])
    def test_a_missing_bucket_or_prefix_is_not_found(self, endpoint: str, uri: str) -> None:
        with pytest.raises(NotFound, match=uri):
            open_source(uri, endpoint_url=endpoint).list()

    def test_an_object_that_is_gone_is_not_found(self, endpoint: str) -> None:
        source = open_source(f"s3://{BUCKET}/tiny", endpoint_url=endpoint)
        gone = StoredObject(key="gone.bin", size_bytes=4, version="1")
        with pytest.raises(NotFound, match=r"gone\.bin"):
            read_range(source, gone)

    def test_wrong_credentials_are_denied_without_repeating_them(
        self, endpoint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wrong = "wrong-" + SECRET_KEY
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
        source = open_source(f"s3://{BUCKET}/tiny", endpoint_url=endpoint)
        with pytest.raises(AccessDenied) as listing:
            source.list()
        with pytest.raises(AccessDenied) as reading:
            read_range(source, StoredObject(key="config.json", size_bytes=2, version="1"))
        assert SECRET_KEY not in str(listing.value) + str(reading.value)
        assert "Signature=" not in str(reading.value)

    def test_missing_credentials_are_denied_with_what_to_set(
        self, endpoint: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(AccessDenied, match="set AWS_ACCESS_KEY_ID"):
            open_source(f"s3://{BUCKET}/tiny", endpoint_url=endpoint).list()

    @pytest.mark.parametrize("url", ["not a url", "127.0.0.1:9000", "ftp://host", "http://", "//["])
    def test_an_endpoint_that_is_no_url_is_refused(self, url: str) -> None:
        with pytest.raises(InvalidRequest, match=f"endpoint_url '{re.escape(url)}' is not a URL"):
            open_source(f"s3://{BUCKET}/tiny", endpoint_url=url)

    def test_a_bucket_that_can_be_none_is_named_without_boto3s_grammar(self, endpoint: str) -> None:
        with pytest.raises(InvalidRequest, match=r"^'No_Bucket!' cannot be the name of a bucket$"):
            open_source("s3://No_Bucket!/tiny", endpoint_url=endpoint).list()

    def test_an_endpoint_that_does_not_answer_is_unavailable(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(SourceUnavailable, match=f"nothing answers at {url}"):
            open_source(f"s3://{BUCKET}/tiny", endpoint_url=url).list()

    def test_an_endpoint_is_named_without_the_password_in_it(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            address = f"127.0.0.1:{closed.getsockname()[1]}"
        source = open_source(f"s3://{BUCKET}/tiny", endpoint_url=f"http://me:pass@{address}")
        with pytest.raises(SourceUnavailable, match=f"nothing answers at http://{address},"):
            source.list()


@pytest.mark.usefixtures("aws_environment")
class TestScriptedStore:
    def test_many_reads_take_one_connection(self) -> None:
        with scripted_source() as (source, store):
            connection, stored = source.connect(), only_object(source)
            buffer = bytearray(len(CONTENT))
            for start in range(0, len(CONTENT), 100):
                connection.read_into(stored, start, memoryview(buffer)[start : start + 100])
            connection.close()
        assert bytes(buffer) == CONTENT
        assert len({get.client_port for get in store.gets}) == 1

    def test_a_refused_signature_is_renewed_once(self) -> None:
        with scripted_source(refuse(403, "AccessDenied")) as (source, store):
            assert read_range(source, only_object(source), 0, 9) == CONTENT[:9]
        assert len(store.gets) == 2

    def test_a_store_that_refuses_is_asked_with_the_credentials_that_there_are_by_then(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with scripted_source(refuse(403, "ExpiredToken")) as (source, store):
            stored = only_object(source)
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
            assert read_range(source, stored, 0, 9) == CONTENT[:9]
        first, second = store.gets
        assert "renewed" not in first.query
        assert "Credential=renewed%2F" in second.query

    def test_sources_of_one_store_share_what_takes_long_to_make(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with serve(ScriptedStore({"tiny/weights.bin": CONTENT})) as url:
            sources = Sources()
            sources.open(f"s3://{BUCKET}/other", endpoint_url=url)
            # What is made now, finds no credentials.
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            source = sources.open(f"s3://{BUCKET}/tiny", endpoint_url=url)
            assert read_range(source, only_object(source), 0, 9) == CONTENT[:9]
            elsewhere = sources.open(f"s3://{BUCKET}/tiny", endpoint_url=url, region="eu-north-1")
            with pytest.raises(AccessDenied, match="set AWS_ACCESS_KEY_ID"):
                elsewhere.list()

    def test_an_environment_without_a_usable_store_is_no_error_before_one_is_wanted(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_PROFILE", "missing")
        sources = Sources()
        sources.prepare()
        with pytest.raises(AccessDenied, match="missing"):
            sources.open(f"s3://{BUCKET}/tiny")

    def test_a_signature_refused_twice_is_denied(self) -> None:
        with (
            scripted_source(*[refuse(403, "ExpiredToken")] * 2) as (source, store),
            pytest.raises(AccessDenied, match="ExpiredToken"),
        ):
            read_range(source, only_object(source), 0, 9)
        assert len(store.gets) == 2

    def test_status_200_with_the_right_range_is_accepted(self) -> None:
        with scripted_source(as_status(200)) as (source, _):
            assert read_range(source, only_object(source), 4, 9) == CONTENT[4:9]

    def test_a_whole_answer_is_accepted_only_where_all_was_asked(self) -> None:
        with scripted_source(*[whole_object(CONTENT)] * 2) as (source, _):
            stored = only_object(source)
            assert read_range(source, stored) == CONTENT
            with pytest.raises(SourceUnavailable, match="ignores byte ranges"):
                read_range(source, stored, 4, 9)

    @pytest.mark.parametrize(
        ("step", "error"),
        [
            (with_header("ETag", '"another"'), InvalidCheckpoint),
            (with_header("ETag", None), InvalidCheckpoint),
            (with_header("Content-Range", "bytes 0-8/9000"), InvalidCheckpoint),
            (with_header("Content-Range", "bytes 1-9/2048"), SourceUnavailable),
            (with_header("Content-Range", "bytes */2048"), SourceUnavailable),
            (with_header("Content-Length", "8"), SourceUnavailable),
            (refuse(404, "NoSuchKey"), NotFound),
            (refuse(416, "InvalidRange"), InvalidCheckpoint),
            (refuse(301, "PermanentRedirect"), InvalidRequest),
            (refuse(301), SourceUnavailable),
        ],
    )
    def test_an_answer_to_another_question_is_refused_at_once(
        self, step: Step, error: type[ParaServeError]
    ) -> None:
        with (
            scripted_source(step) as (source, store),
            pytest.raises(error, match=r"weights\.bin"),
        ):
            read_range(source, only_object(source), 0, 9)
        assert len(store.gets) == 1


@pytest.mark.usefixtures("aws_environment")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_a_store_behind_tls_is_read_only_with_a_certificate_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with serve(ScriptedStore({"tiny/weights.bin": CONTENT}), tls) as url:
        with pytest.raises(SourceUnavailable, match="cannot reach"):
            open_source(f"s3://{BUCKET}/tiny", endpoint_url=url).list()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        source = open_source(f"s3://{BUCKET}/tiny", endpoint_url=url)
        assert read_range(source, only_object(source), 3, 2000) == CONTENT[3:2000]
