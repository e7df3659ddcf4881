"""An S3-compatible object store as a source.

boto3 finds credentials, lists and signs; the bodies come over `weights.ranged_http`, which takes
half the CPU time that boto3 needs for them.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import boto3  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
from botocore import exceptions as aws
from botocore.config import Config  # type: ignore[import-untyped]

from paraserve_backend.errors import (
    AccessDenied,
    InvalidRequest,
    NotFound,
    ParaServeError,
    SourceUnavailable,
)
from paraserve_backend.weights.objects import StoredObject
from paraserve_backend.weights.ranged_http import HttpConnection, UrlSigner, http_version

#: Longest wait for a connection, and for more bytes of a body.
_TIMEOUT_S = 15.0
_SIGNED_FOR_S = 3600
#: A URL is renewed this long before it runs out; clocks may differ.
_RENEW_BEFORE_S = 600
_DEFAULT_REGION = "us-east-1"
_MISSING = frozenset({"NoSuchBucket", "NoSuchKey", "404"})


def open_s3(uri: str, *, endpoint_url: str | None, region: str | None) -> S3Source:
    """Open `s3://bucket/prefix`; raises `InvalidRequest` where the URI or the endpoint is wrong."""
    parts = urlsplit(uri)
    if not parts.netloc or parts.query or parts.fragment:
        raise InvalidRequest(f"{uri!r} does not have the form s3://bucket/prefix")
    prefix = parts.path.strip("/")
    core = botocore.session.Session()
    with _aws_errors(uri):
        client = boto3.Session(botocore_session=core).client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=region or core.get_config_variable("region") or _DEFAULT_REGION,
            config=_client_config(),
        )
        tls = ssl.create_default_context(cafile=core.get_config_variable("ca_bundle"))
    return S3Source(
        uri, client, bucket=parts.netloc, prefix=f"{prefix}/" if prefix else "", tls=tls
    )


def _client_config() -> Config:
    return Config(
        signature_version="s3v4",
        connect_timeout=5,
        read_timeout=_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 3},
        # Else the signed URL demands a header that a plain GET does not send.
        response_checksum_validation="when_required",
    )


class _Pages(Protocol):
    def paginate(self, **parameters: str) -> Iterable[dict[str, Any]]: ...


class _S3Client(Protocol):
    """The part of boto3's client that is used; boto3 makes it at run time, without types."""

    def get_paginator(self, operation_name: str) -> _Pages: ...

    def generate_presigned_url(
        self, client_method: str, *, Params: dict[str, str], ExpiresIn: int
    ) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _SignedUrl:
    url: str
    renew_at_s: float


class S3Source:
    """The objects directly below one prefix of a bucket."""

    def __init__(
        self, uri: str, client: _S3Client, *, bucket: str, prefix: str, tls: ssl.SSLContext
    ) -> None:
        self.uri = uri
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._tls = tls
        self._signed: dict[str, _SignedUrl] = {}

    def list(self) -> tuple[StoredObject, ...]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
        )
        with _aws_errors(self.uri):
            entries = [entry for page in pages for entry in page.get("Contents", ())]
        found = [
            self._stored(entry) for entry in entries if entry["Key"] != self._prefix
        ]  # consoles make "folders" by storing an empty object under the prefix itself
        if not found:
            raise NotFound(f"there is nothing under {self.uri}: check the bucket and the prefix")
        return tuple(sorted(found, key=lambda stored: stored.key))

    def connect(self) -> HttpConnection:
        signer = UrlSigner(url_for=self._url_for, renew=self._renew)
        return HttpConnection(signer, tls=self._tls, timeout_s=_TIMEOUT_S)

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
            return self._renew(key)
        return signed.url

    def _renew(self, key: str) -> str:
        with _aws_errors(self.uri):
            url = self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self._bucket, "Key": self._prefix + key},
                ExpiresIn=_SIGNED_FOR_S,
            )
        renew_at_s = time.monotonic() + _SIGNED_FOR_S - _RENEW_BEFORE_S
        self._signed[key] = _SignedUrl(url=url, renew_at_s=renew_at_s)
        return url


@contextmanager
def _aws_errors(uri: str) -> Iterator[None]:
    """Turn what boto3 raises into our errors; none of its texts carries a secret or a URL query."""
    try:
        yield
    except aws.ClientError as error:
        raise _refusal(uri, error) from None
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
    except (aws.HTTPClientError, aws.ConnectionError) as error:
        raise SourceUnavailable(f"cannot reach the store of {uri}: {_one_line(error)}") from None
    except (aws.BotoCoreError, ValueError, OSError) as error:
        raise InvalidRequest(f"cannot open {uri}: {_one_line(error)}") from None


def _refusal(uri: str, error: aws.ClientError) -> ParaServeError:
    code = error.response.get("Error", {}).get("Code", "")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return NotFound(f"the bucket of {uri} does not exist")
    if code in _MISSING:
        return NotFound(f"{uri} does not exist")
    if status in (400, 401, 403):
        return AccessDenied(f"the store refuses access to {uri} ({code}): check the credentials")
    return SourceUnavailable(f"the store of {uri} answered HTTP {status} {code}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
