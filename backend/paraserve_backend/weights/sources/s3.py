"""An S3-compatible object store as a source: opens, lists and signs with boto3.

The bodies come over `sources.http`, which needs half the processor time that boto3 needs. boto3's
clients are kept from one fetch to the next.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import boto3  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
from botocore import exceptions as aws
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

from paraserve_backend.errors import (
    AccessDenied,
    InvalidRequest,
    NotFound,
    SourceUnavailable,
)
from paraserve_backend.weights.sources.base import StoredObject, StoreIdentity
from paraserve_backend.weights.sources.http import (
    HttpConnection,
    HttpProxy,
    UrlSigner,
    http_version,
)
from paraserve_backend.weights.sources.proxies import environment_proxy
from paraserve_backend.weights.sources.store_errors import REGION_HEADER, Refusal, refused

#: Longest wait for a connection, and for more bytes of a body.
_TIMEOUT_S = 15.0
_SIGNED_FOR_S = 3600
#: A URL is renewed this long before it runs out; clocks may differ.
_RENEW_BEFORE_S = 600
_DEFAULT_REGION = "us-east-1"
#: Told in HTML also where what is behind the proxy is a store.
_PROXY_FAILURES = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Store:
    client: _S3Client
    session: Any
    tls: ssl.SSLContext
    #: None: directly, as boto3 does then.
    proxy: HttpProxy | None

    def identity(self, principal: str | None) -> StoreIdentity:
        """Return where it is and who reads there by now: credentials of a role change."""
        endpoint = _endpoint_of(self.client)
        return StoreIdentity(
            endpoint=endpoint, principal=_digest(principal or _principal(self.session))
        )


class S3Clients:
    """boto3's clients by endpoint and region: making one takes 0.2 s of processor time.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[tuple[str | None, str | None], _Store] = {}

    def get(
        self, uri: str, *, endpoint_url: str | None, region: str | None, unlike: _Store | None
    ) -> _Store:
        """Return a client; made anew from what the AWS environment says where it is `unlike`."""
        key = (endpoint_url, region)
        with self._lock:
            store = self._stores.get(key)
            if store is None or store is unlike:
                store = self._stores[key] = _make_store(uri, endpoint_url, region)
            return store


def open_s3(
    uri: str,
    *,
    endpoint_url: str | None,
    region: str | None,
    clients: S3Clients,
    principal: str | None,
) -> S3Source:
    """Open `s3://bucket/prefix`; raises `InvalidRequest` where the URI or the endpoint is wrong.

    `principal` is the name of who reads; `None` leaves that to the credentials.
    """
    parts = urlsplit(uri)
    if not parts.netloc or parts.query or parts.fragment:
        raise InvalidRequest(f"{uri!r} does not have the form s3://bucket/prefix")
    if endpoint_url and not _is_url(endpoint_url):
        raise InvalidRequest(
            f"endpoint_url {endpoint_url!r} is not a URL: write http://host:port or https://host"
        )
    prefix = parts.path.strip("/")
    return S3Source(
        uri,
        lambda unlike: clients.get(uri, endpoint_url=endpoint_url, region=region, unlike=unlike),
        bucket=parts.netloc,
        prefix=f"{prefix}/" if prefix else "",
        principal=principal,
    )


def _make_store(uri: str, endpoint_url: str | None, region: str | None) -> _Store:
    core = botocore.session.Session()
    with _aws_errors(uri):
        client = boto3.Session(botocore_session=core).client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=region or core.get_config_variable("region") or _DEFAULT_REGION,
            config=_client_config(),
        )
        client.meta.events.register("before-parameter-build.s3", _stay_in_region)
        client.meta.events.register("before-parse.s3", _refuse_web_page)
        tls = ssl.create_default_context(cafile=core.get_config_variable("ca_bundle"))
    proxy = environment_proxy(client.meta.endpoint_url)
    return _Store(client=client, session=core, tls=tls, proxy=proxy)


def _endpoint_of(client: _S3Client) -> str:
    """Return the endpoint in one spelling; never a user and password that the URL may hold."""
    parts = urlsplit(client.meta.endpoint_url)
    default_port = {"http": 80, "https": 443}.get(parts.scheme)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, default_port) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


#: How boto3 says that credentials are those of a role that its settings name.
_ROLE_METHODS = frozenset({"assume-role", "assume-role-with-web-identity"})


def _principal(session: Any) -> str:
    """Return what names the credentials: the role where it is known, else the access key's id."""
    credentials = session.get_credentials()
    if credentials is None:
        return "anonymous"
    role = os.environ.get("AWS_ROLE_ARN") or session.get_scoped_config().get("role_arn")
    if role and credentials.method in _ROLE_METHODS:
        return f"role {role}"
    return f"key {credentials.get_frozen_credentials().access_key}"


def _digest(principal: str) -> str:
    return hashlib.sha256(f"paraserve principal\n{principal}".encode()).hexdigest()[:32]


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _client_config() -> Config:
    return Config(
        signature_version="s3v4",
        connect_timeout=5,
        read_timeout=_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 3},
        # Else the signed URL demands a header that a plain GET does not send.
        response_checksum_validation="when_required",
    )


def _stay_in_region(context: dict[str, Any], **_others: object) -> None:
    """Keep boto3 from following a bucket to its region: what reads the objects would not."""
    context.setdefault("s3_redirect", {})["redirected"] = True


class _NoStore(Exception):
    """The answer is not one of S3."""


def _refuse_web_page(response_dict: dict[str, Any], **_others: object) -> None:
    """See a web site for what it is; boto3 would take it for a failure of S3, and try again."""
    kind = response_dict["headers"].get("Content-Type", "")
    if kind.startswith("text/html") and response_dict["status_code"] not in _PROXY_FAILURES:
        raise _NoStore


class _Pages(Protocol):
    def paginate(self, **parameters: str) -> Iterable[dict[str, Any]]: ...


class _S3Client(Protocol):
    """The part of boto3's client that is used; boto3 makes it at run time, without types."""

    meta: Any

    def get_paginator(self, operation_name: str) -> _Pages: ...

    def generate_presigned_url(
        self, client_method: str, *, Params: dict[str, str], ExpiresIn: int
    ) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _SignedUrl:
    url: str
    store: _Store
    renew_at_s: float


class S3Source:
    """The objects directly below one prefix of a bucket."""

    def __init__(
        self,
        uri: str,
        find: Callable[[_Store | None], _Store],
        *,
        bucket: str,
        prefix: str,
        principal: str | None,
    ) -> None:
        self.uri = uri
        #: Gives a store unlike the one that is its argument.
        self._find = find
        self._store = find(None)
        with _aws_errors(uri):
            self.store = self._store.identity(principal)
        self._bucket = bucket
        self._prefix = prefix
        self._signed: dict[str, _SignedUrl] = {}

    @property
    def _endpoint(self) -> str:
        """Scheme, host and port; never a user and password that the URL may hold."""
        parts = urlsplit(self._store.client.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def list(self) -> tuple[StoredObject, ...]:
        pages = self._store.client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
        )
        with _aws_errors(self.uri, self._endpoint):
            entries = [entry for page in pages for entry in _entries(page)]
        found = [
            self._stored(entry) for entry in entries if entry["Key"] != self._prefix
        ]  # consoles make "folders" by storing an empty object under the prefix itself
        if not found:
            raise NotFound(f"there is nothing under {self.uri}: check the bucket and the prefix")
        return tuple(sorted(found, key=lambda stored: stored.key))

    def connect(self) -> HttpConnection:
        signer = UrlSigner(url_for=self._url_for, renew=self._renew)
        store = self._store
        return HttpConnection(signer, tls=store.tls, timeout_s=_TIMEOUT_S, proxy=store.proxy)

    def _stored(self, entry: dict[str, Any]) -> StoredObject:
        modified_s = int(entry["LastModified"].timestamp())
        return StoredObject(
            key=entry["Key"].removeprefix(self._prefix),
            size_bytes=entry["Size"],
            version=http_version(entry.get("ETag", ""), modified_s, entry["Size"]),
        )

    def _url_for(self, key: str) -> str:
        signed = self._signed.get(key)
        if signed is None or time.monotonic() > signed.renew_at_s:
            return self._sign(key)
        return signed.url

    def _renew(self, key: str) -> str:
        """Sign a URL that was refused with the credentials that there are now."""
        self._store = self._find(self._signed[key].store)
        return self._sign(key)

    def _sign(self, key: str) -> str:
        store = self._store
        with _aws_errors(self.uri):
            url = store.client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self._bucket, "Key": self._prefix + key},
                ExpiresIn=_SIGNED_FOR_S,
            )
        renew_at_s = time.monotonic() + _SIGNED_FOR_S - _RENEW_BEFORE_S
        self._signed[key] = _SignedUrl(url=url, store=store, renew_at_s=renew_at_s)
        return url


def _entries(page: dict[str, Any]) -> list[dict[str, Any]]:
    if "IsTruncated" not in page:  # some other XML
        raise _NoStore
    return list(page.get("Contents", ()))


@contextmanager
def _aws_errors(uri: str, endpoint: str = "") -> Iterator[None]:
    """Turn what boto3 raises into our errors; none of its texts carries a secret or a URL query."""
    try:
        yield
    except aws.ClientError as error:
        refusal = _refusal(error)
        if not refusal.code and refusal.status < 500:
            raise _no_store(uri, endpoint) from None
        raise refused(uri, refusal) from None
    except (_NoStore, ResponseParserError):
        raise _no_store(uri, endpoint) from None
    except (
        aws.NoCredentialsError,
        aws.PartialCredentialsError,
        aws.CredentialRetrievalError,
        aws.ProfileNotFound,
        aws.SSOError,
        aws.TokenRetrievalError,
    ) as error:
        raise AccessDenied(
            f"no usable credentials for {uri} ({_one_line(error)}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile or role"
        ) from None
    except aws.ParamValidationError:
        raise InvalidRequest(f"{urlsplit(uri).netloc!r} cannot be the name of a bucket") from None
    except aws.EndpointConnectionError:
        raise SourceUnavailable(
            f"nothing answers at {endpoint}, where {uri} should be: check the endpoint"
        ) from None
    except (aws.HTTPClientError, aws.ConnectionError) as error:
        raise SourceUnavailable(f"cannot reach the store of {uri}: {_one_line(error)}") from None
    except (aws.BotoCoreError, ValueError, OSError) as error:
        raise InvalidRequest(f"cannot open {uri}: {_one_line(error)}") from None


def _refusal(error: aws.ClientError) -> Refusal:
    said = error.response.get("Error", {})
    answer = error.response.get("ResponseMetadata", {})
    code = said.get("Code", "")
    return Refusal(
        status=answer.get("HTTPStatusCode", 0),
        # boto3 takes the status for a code where the page is not S3's.
        code="" if code.isdigit() else code,
        region=said.get("Region") or answer.get("HTTPHeaders", {}).get(REGION_HEADER, ""),
    )


def _no_store(uri: str, endpoint: str) -> InvalidRequest:
    return InvalidRequest(
        f"{endpoint} does not answer as an S3 store does: check the endpoint of {uri}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
