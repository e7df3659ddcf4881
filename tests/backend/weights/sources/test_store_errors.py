from __future__ import annotations

import pytest

from paraserve_backend.errors import (
    AccessDenied,
    InvalidRequest,
    NotFound,
    ParaServeError,
    SourceUnavailable,
)
from paraserve_backend.weights.sources.store_errors import read_refusal, refused

WRONG_REGION = (
    b'<?xml version="1.0"?>\n<Error><Code>AuthorizationHeaderMalformed</Code>'
    b"<Message>expecting 'eu-west-1'</Message><Region>eu-west-1</Region></Error>"
)


def page(code: str) -> bytes:
    return f"<Error><Code>{code}</Code></Error>".encode()


@pytest.mark.parametrize(
    ("status", "region", "content", "kind", "part"),
    [
        (400, None, WRONG_REGION, InvalidRequest, "of x is in region eu-west-1: set its region to"),
        (301, "eu-2", page("PermanentRedirect"), InvalidRequest, "is in region eu-2: set its"),
        (301, None, page("PermanentRedirect"), InvalidRequest, "is in another region: set its"),
        (400, None, page("AuthorizationHeaderMalformed"), AccessDenied, "check that these"),
        (400, None, page("ExpiredToken"), AccessDenied, "(HTTP 400 ExpiredToken): the credentials"),
        (403, None, page("SignatureDoesNotMatch"), AccessDenied, "check AWS_SECRET_ACCESS_KEY"),
        (403, None, b"<html>no</html>", AccessDenied, "refuses access to x (HTTP 403): check"),
        (404, None, page("NoSuchBucket"), NotFound, "the bucket of x does not exist"),
        (404, None, page("NoSuchKey"), NotFound, "x is no longer in the store (HTTP 404 NoSuch"),
        (418, None, b"", SourceUnavailable, "the store answered HTTP 418 for x"),
    ],
)
def test_a_refusal_says_what_to_do(
    status: int, region: str | None, content: bytes, kind: type[ParaServeError], part: str
) -> None:
    error = refused("x", read_refusal(status, region, content))
    assert type(error) is kind
    assert part in str(error)


def test_what_a_store_sends_is_not_repeated_unless_it_is_a_word() -> None:
    refusal = read_refusal(403, None, page("\x1b[2J") + b"<Region>a b</Region>")
    assert (refusal.code, refusal.region) == ("", "")
