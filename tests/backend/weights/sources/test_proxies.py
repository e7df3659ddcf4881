"""Object stores behind the proxy that the environment names: listing and bodies go the same way."""

from __future__ import annotations

import random
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paraserve_backend.errors import InvalidRequest, SourceUnavailable
from paraserve_backend.weights.sources.base import BrokenTransfer, Source
from paraserve_backend.weights.sources.http import HttpProxy
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.sources.proxies import environment_proxy
from paraserve_backend.weights.sources.retry import read_range
from tests.support.proxies import DEAD, running_proxy
from tests.support.stores import BUCKET, ScriptedStore, make_certificate, rclone_store, serve

CONTENT = random.Random(5).randbytes(700_000)
#: A host that only the proxy finds.
HIDDEN = "store.hidden"


@pytest.fixture(autouse=True)
def _environment(aws_environment: None, no_proxies: None) -> None:
    """The test stores' credentials, and nothing of what the machine has."""


@contextmanager
def stored(tls: ssl.SSLContext | None = None) -> Iterator[tuple[ScriptedStore, str]]:
    store = ScriptedStore({"tiny/weights.bin": CONTENT})
    with serve(store, tls) as url:
        yield store, url


def tiny(endpoint_url: str) -> Source:
    return open_source(f"s3://{BUCKET}/tiny", endpoint_url=endpoint_url)


def read_all(source: Source) -> bytes:
    (weights,) = source.list()
    return read_range(source, weights, 0, 300_000) + read_range(source, weights, 300_000)


def test_a_store_that_only_the_proxy_reaches_is_listed_and_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running_proxy() as proxy, stored() as (_, url):
        proxy.hosts[HIDDEN] = url.removeprefix("http://")
        monkeypatch.setenv("http_proxy", proxy.url)
        assert read_all(tiny(f"http://{HIDDEN}")) == CONTENT
        assert proxy.count("GET", "/weights.bin") == 2
        assert proxy.count("GET") == 3


def test_a_real_store_takes_what_came_through_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signatures cover the host that it was asked for."""
    folder = tmp_path / BUCKET / "tiny"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(CONTENT)
    with running_proxy() as proxy, rclone_store(tmp_path) as url:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert read_all(tiny(url)) == CONTENT
        assert proxy.count("GET", "/weights.bin") == 2


def test_tls_goes_through_a_tunnel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "certificate.pem"))
    with running_proxy() as proxy, stored(tls) as (store, url):
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.setenv("http_proxy", DEAD)
        assert read_all(tiny(url)) == CONTENT
        assert proxy.count("CONNECT", url.removeprefix("https://")) == 3
        assert len(store.gets) == 2


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_a_host_that_no_proxy_names_is_reached_directly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stored() as (_, url):
        monkeypatch.setenv("http_proxy", DEAD)
        monkeypatch.setenv(name, "example.com,127.0.0.1")
        assert read_all(tiny(url)) == CONTENT


@pytest.mark.parametrize("is_tls", [False, True])
def test_a_proxy_is_told_user_and_password(
    is_tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = None
    if is_tls:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(make_certificate(tmp_path))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "certificate.pem"))
    with running_proxy(credentials="me:s3cr@t") as proxy, stored(tls) as (_, url):
        named = proxy.url.replace("http://", "http://me:s3cr%40t@")
        monkeypatch.setenv("https_proxy" if is_tls else "http_proxy", named)
        assert read_all(tiny(url)) == CONTENT
        assert len(proxy.seen) == 3


def test_a_proxy_that_is_gone_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with stored() as (_, url):
        (weights,) = tiny(url).list()
        monkeypatch.setenv("http_proxy", "http://me:s3cret@127.0.0.1:1")
        source = tiny(url)
        with pytest.raises(BrokenTransfer, match=r"\(through proxy 127\.0\.0\.1:1\)"):
            source.connect().read_into(weights, 0, memoryview(bytearray(9)))
        with pytest.raises(SourceUnavailable) as listed:
            source.list()
        assert "s3cret" not in str(listed.value)


@pytest.mark.parametrize("named", ["https://proxy:443", "socks5://proxy:1080", "http://p:nan"])
def test_a_proxy_of_another_kind_is_refused(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", named)
    with pytest.raises(InvalidRequest, match="proxy in https_proxy: write it as http://host:port"):
        environment_proxy("https://store.example")


@pytest.mark.parametrize(
    ("named", "host", "port"),
    [("http://p:3128", "p", 3128), ("p:3128", "p", 3128), ("//p", "p", 80), ("http://p", "p", 80)],
)
def test_a_proxy_may_be_written_as_boto3_takes_it(
    named: str, host: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", named)
    expected = HttpProxy(host=host, port=port, headers={})
    assert environment_proxy("https://store.example") == expected
    assert environment_proxy("http://store.example") is None
