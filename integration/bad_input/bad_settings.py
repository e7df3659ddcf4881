"""Settings files that cannot be: what `paraserve agent`, `scheduler` and `gateway` then say."""

from __future__ import annotations

from dataclasses import dataclass

from integration.support.refusals import Refusal
from paraserve_backend.errors import InvalidRequest, ParaServeError


@dataclass(frozen=True, slots=True, kw_only=True)
class BadFile(Refusal):
    """`says` may name the `{path}` of the file."""

    error: type[ParaServeError] = InvalidRequest
    daemon: str
    #: `None`: there is no such file.
    content: bytes | None


SETTINGS = (
    BadFile(
        what="a misspelt setting of an agent",
        says="Unknown setting 'memory_byte' in {path}; did you mean 'memory_bytes'?",
        daemon="agent",
        content=b"memory_byte: 1000\n",
    ),
    BadFile(
        what="a misspelt setting of a gateway",
        says="Unknown setting 'scheduler_adress' in {path}; did you mean 'scheduler_address'?",
        daemon="gateway",
        content=b"scheduler_adress: 127.0.0.1:1\n",
    ),
    BadFile(
        what="a misspelt setting inside a section",
        says="Unknown setting 'policy.placement.kvshare' in {path}; did you mean "
        "'policy.placement.kv_share'?",
        daemon="scheduler",
        content=b"policy: {placement: {kvshare: 0.5}}\n",
    ),
    BadFile(
        what="a setting that is missing",
        says="Setting 'scheduler_address' is missing from {path}.",
        daemon="gateway",
        content=b"",
    ),
    BadFile(
        what="a text for a number",
        says="Setting 'memory_bytes' in {path} takes a whole number of at least 0, not '4GB'.",
        daemon="agent",
        content=b"memory_bytes: 4GB\n",
    ),
    BadFile(
        what="a negative time",
        says="Setting 'heartbeat_interval_s' in {path} takes a finite number of at least 0, "
        "not -1.",
        daemon="scheduler",
        content=b"heartbeat_interval_s: -1\n",
    ),
    BadFile(
        what="a time that is not a number",
        says="Setting 'inter_token_timeout_s' in {path} takes a finite number of at least 0, "
        "not nan.",
        daemon="gateway",
        content=b"inter_token_timeout_s: .nan\n",
    ),
    BadFile(
        what="a number for true or false",
        says="Setting 'with_gateway' in {path} takes true or false, not 1.",
        daemon="scheduler",
        content=b"with_gateway: 1\n",
    ),
    BadFile(
        what="a text for a section",
        says="Setting 'policy' in {path} takes settings of its own, as key: value lines, "
        "not 'strict'.",
        daemon="scheduler",
        content=b"policy: strict\n",
    ),
    BadFile(
        what="a setting that is there twice",
        says="{path} is not valid YAML: the key 'listen' is there twice in line 3.",
        daemon="scheduler",
        content=b"listen: 127.0.0.1:1\nwith_gateway: true\nlisten: 127.0.0.1:2\n",
    ),
    BadFile(
        what="a file that is not YAML",
        says="{path} is not valid YAML: expected ',' or ']', but got '<stream end>' in line 2.",
        daemon="scheduler",
        content=b"listen: [127.0.0.1\n",
    ),
    BadFile(
        what="a file that is not text",
        says="{path} is not valid YAML: it is not UTF-8 text.",
        daemon="agent",
        content=b"\xff\xfe\x00",
    ),
    BadFile(
        what="a file without settings",
        says="{path} must hold settings as key: value lines.",
        daemon="gateway",
        content=b"- scheduler_address\n",
    ),
    BadFile(
        what="a file that does not exist",
        says="Cannot read {path}: No such file or directory.",
        daemon="agent",
        content=None,
    ),
    BadFile(
        what="a token file that does not exist",
        says="Cannot read token_file /nowhere/token: No such file or directory.",
        daemon="scheduler",
        content=b"token_file: /nowhere/token\n",
    ),
    BadFile(
        what="an address for everybody, without a token",
        says="Refusing to listen on 0.0.0.0:8470 without a cluster token: set token_file "
        "(or PARASERVE_TOKEN), or listen on 127.0.0.1.",
        daemon="scheduler",
        content=b"listen: 0.0.0.0:8470\n",
    ),
    BadFile(
        what="an address without a port",
        says="Setting 'triton' is 'localhost'; write it as host:port.",
        daemon="agent",
        content=b"name: n\nscheduler: localhost:1\ntriton: localhost\n"
        b"model_repository: /models\nrun_dir: /run/paraserve\n",
    ),
)
