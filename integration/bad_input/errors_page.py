"""docs/errors.md, made of the tables that the tests of bad input run.

`python -m integration.bad_input.errors_page` writes it; a test fails where it is not up to date.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from integration.bad_input.bad_checkpoints import CHECKPOINTS
from integration.bad_input.bad_requests import BODIES, REPLICA_REQUESTS, REQUESTS
from integration.bad_input.bad_settings import SETTINGS
from integration.bad_input.bad_sources import SOURCES, SPECS, STORES
from integration.support.refusals import Refusal
from paraserve_backend.errors import ParaServeError

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
_MAX_CHARACTERS = 160
_INTRODUCTION = """\
# Errors

What is said about bad input, in exactly these words; names in capitals stand for what differs.
This page is made of the tables that the integration tests run on a real cluster, with Triton's own
clients where it is about requests: `python -m integration.bad_input.errors_page`.

- A request that is refused wakes no model, a deployment that is refused leaves nothing behind.
- A cold start that fails answers every request that waits with `The cold start of 'NAME' failed: `
  and the reason, and takes everything away from the nodes.
- The command line prints the sentence after `paraserve: ` on standard error and exits with 1; wrong
  usage exits with 2.
"""
_DEPLOY, _REQUEST, _START = "gRPC", "gRPC, HTTP", "exit status"
_SECTIONS: Sequence[tuple[str, str, Sequence[Refusal]]] = (
    ("Settings of a deployment", _DEPLOY, SPECS),
    ("Its source", _DEPLOY, SOURCES),
    ("Its object store", _DEPLOY, STORES),
    ("Its checkpoint", _DEPLOY, CHECKPOINTS),
    ("Requests", _REQUEST, REQUESTS),
    ("Bodies of `generate`", _REQUEST, BODIES),
    ("Requests that only a replica can judge", _REQUEST, REPLICA_REQUESTS),
    ("Settings files of agent, scheduler and gateway", _START, SETTINGS),
)


class _Placeholders(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return key.upper()


def page() -> str:
    return "\n".join([_INTRODUCTION, *(line for each in _SECTIONS for line in _section(*each))])


def _section(title: str, kind: str, cases: Sequence[Refusal]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"| what is wrong | what is said | {kind} |"
    yield "|---|---|---|"
    for case in cases:
        yield f"| {case.what} | {_shown(case)} | {_code(kind, case.error)} |"
    yield ""


def _code(kind: str, error: type[ParaServeError]) -> str:
    if kind == _START:
        return "1"
    return f"{error.grpc_code}, {error.http_status}" if kind == _REQUEST else error.grpc_code


def _shown(case: Refusal) -> str:
    text = case.says.format_map(_Placeholders())
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
