"""Clients that are programs: curl, AIPerf, and KServe's client in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from integration.clients import environments
from integration.clients.question import (
    UNKNOWN,
    Answer,
    Ask,
    Gateway,
    Look,
    Question,
    Sight,
)
from integration.support.limits import HANG_S
from tests.support.models import write_words

Json = dict[str, Any]

_KSERVE_SCRIPT = Path(__file__).with_name("kserve_client.py")
#: Requests of one AIPerf run; on a cold deployment the first waits and the others do not.
_AIPERF_REQUESTS = 4


class CommandFailed(Exception):
    """A program ended with an error; the text is all it printed."""


def curl_generate(gateway: Gateway, question: Question) -> Answer:
    return _answer([json.loads(_post(gateway, question, "generate"))])


def curl_generate_stream(gateway: Gateway, question: Question) -> Answer:
    body = _post(gateway, question, "generate_stream", "--no-buffer")
    events = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n") if event]
    assert len(events) == question.max_tokens, "each token is an event"
    return _answer(events)


def curl_look(gateway: Gateway, deployment: str) -> Sight:
    def is_ok(path: str) -> bool:
        url = f"http://{gateway.http_address}/v2/{path}"
        return _run("curl", "--silent", "--output", os.devnull, "-w", "%{http_code}", url) == "200"

    return Sight(
        is_server_live=is_ok("health/live"),
        is_server_ready=is_ok("health/ready"),
        is_deployment_ready=is_ok(f"models/{deployment}/ready"),
        is_unknown_ready=is_ok(f"models/{UNKNOWN}/ready"),
    )


def curl_metadata(gateway: Gateway, deployment: str) -> Json:
    url = f"http://{gateway.http_address}/v2/models/{deployment}"
    metadata: Json = json.loads(_run("curl", "--silent", "--fail-with-body", url))
    return metadata


def kserve_grpc(gateway: Gateway, question: Question) -> Answer:
    return Answer(**_kserve("grpc", gateway.grpc_address, asdict(question)))


def kserve_rest(gateway: Gateway, question: Question) -> Answer:
    return Answer(**_kserve("rest", f"http://{gateway.http_address}", asdict(question)))


def kserve_grpc_look(gateway: Gateway, deployment: str) -> Sight:
    return Sight(**_kserve("grpc", gateway.grpc_address, _to_look_at(deployment)))


def kserve_rest_look(gateway: Gateway, deployment: str) -> Sight:
    return Sight(**_kserve("rest", f"http://{gateway.http_address}", _to_look_at(deployment)))


def aiperf(gateway: Gateway, question: Question) -> Answer:
    """Benchmark `generate_stream` for a few requests, as a user would; all get the same answer."""
    with tempfile.TemporaryDirectory() as folder:
        results = _aiperf(gateway, question, Path(folder))
        metrics = json.loads((results / "profile_export_aiperf.json").read_bytes())
        lines = (results / "profile_export_raw.jsonl").read_text(encoding="utf-8").splitlines()
    assert metrics["request_count"]["avg"] == _AIPERF_REQUESTS
    assert metrics["time_to_first_token"]["count"] == _AIPERF_REQUESTS
    assert metrics["output_sequence_length"]["min"] == question.max_tokens
    first, *others = [_answer(_events(json.loads(line))) for line in lines]
    assert others == [first] * (_AIPERF_REQUESTS - 1)
    return first


CURL_WAYS: dict[str, Ask] = {
    "curl-generate": curl_generate,
    "curl-generate_stream": curl_generate_stream,
}
CURL_LOOKS: dict[str, Look] = {"curl": curl_look}
KSERVE_WAYS: dict[str, Ask] = {"kserve-grpc": kserve_grpc, "kserve-rest": kserve_rest}
KSERVE_LOOKS: dict[str, Look] = {"kserve-grpc": kserve_grpc_look, "kserve-rest": kserve_rest_look}
AIPERF_WAYS: dict[str, Ask] = {"aiperf-generate_stream": aiperf}


def _post(gateway: Gateway, question: Question, call: str, *options: str) -> str:
    url = f"http://{gateway.http_address}/v2/models/{question.deployment}/{call}"
    body = {
        "text_input": question.prompt,
        "max_tokens": question.max_tokens,
        "stream": call == "generate_stream",
    }
    return _run("curl", "--silent", "--fail-with-body", *options, "-d", json.dumps(body), url)


def _kserve(protocol: str, url: str, wanted: Json) -> Json:
    python = str(environments.program("kserve", "python"))
    wanted = {"protocol": protocol, "url": url, **wanted}
    answer: Json = json.loads(_run(python, str(_KSERVE_SCRIPT), json.dumps(wanted)))
    return answer


def _to_look_at(deployment: str) -> Json:
    return {"deployment": deployment, "unknown": UNKNOWN}


def _aiperf(gateway: Gateway, question: Question, folder: Path) -> Path:
    """Run it and return the folder of its results."""
    template = {"text_input": "PROMPT", "max_tokens": question.max_tokens, "stream": True}
    inputs = {
        "payload_template": json.dumps(template).replace('"PROMPT"', "{{ text|tojson }}"),
        "response_field": "text_output",
    }
    (folder / "prompts.jsonl").write_text(json.dumps({"text": question.prompt}), encoding="utf-8")
    _run(
        *(str(environments.program("aiperf", "aiperf")), "profile"),
        *("--model", question.deployment, "--url", f"http://{gateway.http_address}"),
        *("--endpoint", f"/v2/models/{question.deployment}/generate_stream", "--streaming"),
        *("--endpoint-type", "template", "--extra-inputs", json.dumps(inputs)),
        *("--input-file", str(folder / "prompts.jsonl"), "--custom-dataset-type", "single-turn"),
        *("--tokenizer", str(_write_tokenizer(folder / "tokenizer"))),
        *("--request-count", str(_AIPERF_REQUESTS), "--concurrency", "1"),
        *("--no-gpu-telemetry", "--no-server-metrics", "--ui", "none"),
        *("--artifact-dir", str(folder / "results"), "--export-level", "raw"),
    )
    return folder / "results"


def _write_tokenizer(folder: Path) -> Path:
    """Write the deployment's tokenizer as transformers loads it: AIPerf counts tokens by it."""
    folder.mkdir()
    write_words(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _events(record: Json) -> list[Json]:
    """Return the server-sent events of one of AIPerf's raw records."""
    return [
        json.loads(packet["value"])
        for response in record["responses"]
        for packet in response["packets"]
    ]


def _answer(responses: Sequence[Json]) -> Answer:
    ids = [response["output_ids"] for response in responses]
    return Answer(
        # One token alone comes as a plain number.
        token_ids=[token for each in ids for token in (each if isinstance(each, list) else [each])],
        text="".join(response["text_output"] for response in responses),
    )


def _run(*command: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    if done.returncode:
        raise CommandFailed(done.stdout + done.stderr)
    return done.stdout
