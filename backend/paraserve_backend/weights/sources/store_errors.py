"""What an S3 store refuses, as one sentence that says what to do. Pure.

Listing (`s3`) and reading (`http`) ask by different clients and tell the user the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from paraserve_backend.errors import (
    AccessDenied,
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
    ParaServeError,
    SourceUnavailable,
)

#: Header in which S3 names a bucket's region.
REGION_HEADER = "x-amz-bucket-region"
_CODE = re.compile(rb"<Code>(\w{1,64})</Code>")
_REGION = re.compile(rb"<Region>([\w-]{1,64})</Region>")
#: Said about a wrong region, and where no region comes with it about other mistakes too.
_MALFORMED = frozenset({"AuthorizationHeaderMalformed", "AuthorizationQueryParametersError"})
_REDIRECT = "PermanentRedirect"
_RENEW = "the credentials have expired, renew them where the scheduler and the agents run"
_REMEDIES: Mapping[str, str] = {
    "ExpiredToken": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "InvalidToken": "the session token is wrong, check AWS_SESSION_TOKEN",
    "InvalidAccessKeyId": "it does not know the access key, check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong, check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "the clock of the machine that asked is wrong, set it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer that is not what was asked for; `code` and `region` are empty where not told."""

    status: int
    code: str
    #: Where the bucket is, if the store says so.
    region: str

    @property
    def said(self) -> str:
        return f"HTTP {self.status} {self.code}".rstrip()


def read_refusal(status: int, region: str | None, page: bytes) -> Refusal:
    """Read S3's error page; any other page has no code. `region` is what `REGION_HEADER` holds."""
    return Refusal(status=status, code=_found(_CODE, page), region=region or _found(_REGION, page))


def refused(what: str, refusal: Refusal) -> ParaServeError:
    """Return the error for a store that does not give `what`, an object or a source."""
    if refusal.code == _REDIRECT or (refusal.region and refusal.code in _MALFORMED):
        return _elsewhere(what, refusal)
    if refusal.status in (400, 401, 403):
        remedy = _REMEDIES.get(refusal.code, "check that these credentials may read it")
        return AccessDenied(f"the store refuses access to {what} ({refusal.said}): {remedy}")
    if refusal.code == "NoSuchBucket":
        return NotFound(f"the bucket of {what} does not exist")
    if refusal.status == 404:
        return NotFound(f"{what} is no longer in the store ({refusal.said})")
    return SourceUnavailable(f"the store answered {refusal.said} for {what}")


def _elsewhere(what: str, refusal: Refusal) -> InvalidRequest:
    if not refusal.region:
        return InvalidRequest(f"the bucket of {what} is in another region: set its region")
    return InvalidRequest(
        f"the bucket of {what} is in region {refusal.region}: set its region to {refusal.region}"
    )


def changed(key: str) -> InvalidCheckpoint:
    """Return the error for an object that is not the one whose header was read."""
    return InvalidCheckpoint(
        f"{key} has changed since it was deployed: delete the deployment and deploy it again"
    )


def _found(pattern: re.Pattern[bytes], page: bytes) -> str:
    match = pattern.search(page)
    return match[1].decode() if match else ""
