"""Deployments whose settings, source or store are wrong, and what a deploy then says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from integration.support.refusals import Refusal
from integration.support.strict_store import (
    DENIED,
    EXPIRED,
    UNKNOWN_KEY,
    WRONG_CLOCK,
    WRONG_SECRET,
    moved,
    page_answer,
)
from paraserve_backend.errors import (
    AccessDenied,
    AlreadyExists,
    InvalidRequest,
    NotFound,
)
from tests.support.stores import Answer

_RENEW = "the credentials have expired, renew them where the scheduler and the agents run"
_NO_STORE = "{endpoint} does not answer as an S3 store does: check the endpoint of {source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadSpec(Refusal):
    """Fields of the specification; `words` say the same on the command line."""

    error: type[InvalidRequest | AlreadyExists | NotFound] = InvalidRequest
    fields: Mapping[str, Any]
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BadStore(Refusal):
    region: str = "us-east-1"
    #: `None`: the store only insists on its region.
    answer: Answer | None = None


def _seconds(what: str, name: str, value: float) -> BadSpec:
    says = f"{name} is {value:g}; it must be a finite number of seconds > 0."
    return BadSpec(what=what, says=says, fields={name: value})


SPECS = (
    BadSpec(
        what="a name with letters that are not allowed",
        says="Deployment name 'Big_Model' is not valid: use 1 to 63 lower-case letters, digits "
        "and dashes, with no dash at either end.",
        fields={"name": "Big_Model"},
        words=("Big_Model",),
    ),
    BadSpec(
        what="a name that is in use with other settings",
        says="Deployment 'good' exists with other settings (ttft_slo_s unset, not 5; max_stages "
        "1, not 2): delete it first, or choose another name.",
        error=AlreadyExists,
        fields={"name": "good", "max_stages": 2, "ttft_slo_s": 5.0},
        words=("good", "--max-stages", "2", "--ttft-slo", "5"),
    ),
    _seconds("an SLO of zero", "ttft_slo_s", 0.0),
    _seconds("a negative SLO", "tpot_slo_s", -1.0),
    _seconds("an SLO that is not a number", "ttft_slo_s", float("nan")),
    _seconds("an SLO that is infinite", "tpot_slo_s", float("inf")),
    _seconds("a keep-alive of zero", "keep_alive_s", 0.0),
    BadSpec(
        what="fewer replicas at most than at least",
        says="max_replicas 1 is less than min_replicas 2: make it at least as many.",
        fields={"min_replicas": 2, "max_replicas": 1},
        words=("bad", "--min-replicas", "2", "--max-replicas", "1"),
    ),
    BadSpec(
        what="a kind of device that we do not know",
        says="device 'tpu' is not one of cpu, cuda.",
        fields={"device": "tpu"},
    ),
    BadSpec(
        what="a context that is longer than the model's",
        says="max_context 513 is more than the 512 tokens the model was made for.",
        fields={"max_context": 513},
        words=("bad", "--max-context", "513"),
    ),
    BadSpec(
        what="an endpoint that is not a URL",
        says="endpoint_url '127.0.0.1:9000' is not a URL: write http://host:port or https://host",
        fields={"endpoint_url": "127.0.0.1:9000"},
        words=("bad", "--endpoint-url", "127.0.0.1:9000"),
    ),
    BadSpec(
        what="a region that cannot be one",
        says="cannot open {source}: Provided region_name 'eu west' doesn't match a supported "
        "format.",
        fields={"region": "eu west"},
        words=("bad", "--region", "eu west"),
    ),
)

SOURCES = (
    BadSpec(
        what="no source",
        says="cannot read models from '': use s3://bucket/prefix, file:///folder or /folder",
        fields={},
    ),
    BadSpec(
        what="a source of another kind",
        says="cannot read models from 'ftp://host/model': use s3://bucket/prefix, "
        "file:///folder or /folder",
        fields={"source": "ftp://host/model"},
    ),
    BadSpec(
        what="a source without bucket",
        says="'s3:///model' does not have the form s3://bucket/prefix",
        fields={"source": "s3:///model"},
    ),
    BadSpec(
        what="a bucket's name that cannot be one",
        says="'Big_Bucket!' cannot be the name of a bucket",
        fields={"source": "s3://Big_Bucket!/model"},
    ),
    BadSpec(
        what="a bucket that does not exist",
        says="the bucket of s3://nowhere/model does not exist",
        error=NotFound,
        fields={"source": "s3://nowhere/model"},
    ),
    BadSpec(
        what="a prefix with nothing under it",
        says="there is nothing under s3://models/nothing: check the bucket and the prefix",
        error=NotFound,
        fields={"source": "s3://models/nothing"},
    ),
    BadSpec(
        what="a folder that is not absolute",
        says="model folder 'models/tiny' must be an absolute path: nodes have no cwd",
        fields={"source": "models/tiny"},
    ),
    BadSpec(
        what="a folder that does not exist",
        says="model folder /nowhere/model does not exist: No such file or directory",
        error=NotFound,
        fields={"source": "/nowhere/model"},
    ),
)

STORES = (
    BadStore(
        what="the wrong region",
        says="the bucket of {source} is in region eu-west-1: set its region to eu-west-1",
        error=InvalidRequest,
        region="eu-west-1",
    ),
    BadStore(
        what="the endpoint of another region",
        says="the bucket of {source} is in region eu-central-1: set its region to eu-central-1",
        error=InvalidRequest,
        answer=moved("eu-central-1").answer(),
    ),
    BadStore(
        what="expired credentials",
        says=f"the store refuses access to {{source}} (HTTP 400 ExpiredToken): {_RENEW}",
        error=AccessDenied,
        answer=EXPIRED.answer(),
    ),
    BadStore(
        what="an unknown access key",
        says="the store refuses access to {source} (HTTP 403 InvalidAccessKeyId): it does not "
        "know the access key, check AWS_ACCESS_KEY_ID",
        error=AccessDenied,
        answer=UNKNOWN_KEY.answer(),
    ),
    BadStore(
        what="a wrong secret key",
        says="the store refuses access to {source} (HTTP 403 SignatureDoesNotMatch): the secret "
        "key is wrong, check AWS_SECRET_ACCESS_KEY",
        error=AccessDenied,
        answer=WRONG_SECRET.answer(),
    ),
    BadStore(
        what="a clock that is wrong",
        says="the store refuses access to {source} (HTTP 403 RequestTimeTooSkewed): the clock of "
        "the machine that asked is wrong, set it",
        error=AccessDenied,
        answer=WRONG_CLOCK.answer(),
    ),
    BadStore(
        what="credentials without the right to read",
        says="the store refuses access to {source} (HTTP 403 AccessDenied): check that these "
        "credentials may read it",
        error=AccessDenied,
        answer=DENIED.answer(),
    ),
    BadStore(
        what="an endpoint that is a web site",
        says=_NO_STORE,
        error=InvalidRequest,
        answer=page_answer(200, "<!DOCTYPE html><p>Welcome<br>to nginx!", "text/html"),
    ),
    BadStore(
        what="an endpoint that is a tidy web site",
        says=_NO_STORE,
        error=InvalidRequest,
        answer=page_answer(200, "<html><body>Welcome</body></html>", "application/xhtml+xml"),
    ),
    BadStore(
        what="an endpoint that is a web site without that page",
        says=_NO_STORE,
        error=InvalidRequest,
        answer=page_answer(404, "<html><h1>404 Not Found</h1></html>", "text/html"),
    ),
    BadStore(
        what="an endpoint that leads to another page",
        says=_NO_STORE,
        error=InvalidRequest,
        answer=page_answer(301, "<html>Moved</html>", "text/html", {"Location": "http://x/"}),
    ),
)
