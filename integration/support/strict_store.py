"""An S3 server that insists on its region and on valid credentials, and refuses in S3's own words.

The embedded store takes any region and knows no sessions that expire. Bodies and listings are those
of the unit tests' store; what is real here are the refusals, from S3's list of error codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from tests.support.stores import Answer, ScriptedStore

#: What a request carries the access key, the day and the region in: `key/day/region/s3/…`.
_CREDENTIAL = "Credential="
_WRONG_QUERY = "AuthorizationQueryParametersError"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreError:
    """One of S3's errors; `fields` are the elements it adds to the page."""

    status: int
    code: str
    message: str
    fields: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def answer(self) -> Answer:
        elements = {"Code": self.code, "Message": self.message, **self.fields}
        inner = "".join(f"<{name}>{escape(text)}</{name}>" for name, text in elements.items())
        page = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{inner}'
            "<RequestId>4442587FB7D0A2F9</RequestId><HostId>none</HostId></Error>"
        )
        return page_answer(self.status, page, "application/xml", self.headers)


EXPIRED = StoreError(status=400, code="ExpiredToken", message="The provided token has expired.")
UNKNOWN_KEY = StoreError(
    status=403,
    code="InvalidAccessKeyId",
    message="The AWS Access Key Id you provided does not exist in our records.",
)
WRONG_SECRET = StoreError(
    status=403,
    code="SignatureDoesNotMatch",
    message="The request signature we calculated does not match the signature you provided. "
    "Check your key and signing method.",
)
WRONG_CLOCK = StoreError(
    status=403,
    code="RequestTimeTooSkewed",
    message="The difference between the request time and the current time is too large.",
)
DENIED = StoreError(status=403, code="AccessDenied", message="Access Denied")


def moved(region: str) -> StoreError:
    return StoreError(
        status=301,
        code="PermanentRedirect",
        message="The bucket you are attempting to access must be addressed using the specified "
        "endpoint. Please send all future requests to this endpoint.",
        fields={"Endpoint": f"models.s3.{region}.amazonaws.com", "Bucket": "models"},
        headers={"x-amz-bucket-region": region},
    )


def page_answer(
    status: int, page: str, content_type: str, headers: Mapping[str, str] | None = None
) -> Answer:
    body = page.encode()
    length = {"Content-Length": str(len(body)), "Content-Type": content_type}
    return Answer(status=status, headers=length | dict(headers or {}), body=body)


class StrictStore(ScriptedStore):
    """The files of one folder under a prefix of the same name, in a bucket of `region`."""

    def __init__(self, folder: Path, *, region: str = "us-east-1") -> None:
        super().__init__(
            {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
        )
        self.region = region
        #: What every request is answered with, if anything.
        self.answer: Answer | None = None
        #: Reads of weights after which the credentials have expired.
        self.reads_left: int | None = None

    def refusal(self, path: str, headers: Mapping[str, str]) -> Answer | None:
        wrong_region = self._check_region(path, headers.get("Authorization"))
        if wrong_region is not None:
            return wrong_region.answer()
        if ".safetensors" in path and self._is_used_up():
            return EXPIRED.answer()
        return self.answer

    def _check_region(self, path: str, authorization: str | None) -> StoreError | None:
        """Compare with the region a request is signed for, in its header or in its URL."""
        text = authorization or path.replace("%2F", "/")
        given = text.partition(_CREDENTIAL)[2].split("/")[2]
        if given == self.region:
            return None
        kind = "AuthorizationHeaderMalformed" if authorization else _WRONG_QUERY
        message = f"The region '{given}' is wrong; expecting '{self.region}'"
        fields = {"Region": self.region}
        return StoreError(status=400, code=kind, message=message, fields=fields)

    def _is_used_up(self) -> bool:
        with self.lock:
            if self.reads_left:
                self.reads_left -= 1
                return False
            return self.reads_left == 0
