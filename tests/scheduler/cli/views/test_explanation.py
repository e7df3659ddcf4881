from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.views.explanation import comparisons, render

_SPANS = [
    pb.Span(name="fetch", start_s=100.5, end_s=102.5, bytes=200_000_000),
    pb.Span(name="adopt weights", start_s=101.5, end_s=102.6),
    pb.Span(name="load tiny.1", start_s=100.5, end_s=102.75),
]


def _replica(**fields: Any) -> pb.ReplicaStatus:
    stage = pb.StagePrediction(runtime_s=2.0, fetch_s=1.0, ready_s=2.5, store_bytes=200_000_000)
    values: dict[str, Any] = {
        "replica": "tiny.1",
        "reason": "1 waits: layers [0, 4) on n0",
        "requested_s": 100.0,
        "planned_s": 100.25,
        "ready_s": 102.75,
        "first_token_s": 103.0,
        "prediction": pb.Prediction(ready_s=2.0, ttft_s=3.6, tpot_s=0.1, stages=[stage]),
        "parts": [
            pb.ReplicaPart(
                node="n0", layer_start=0, layer_end=4, status=pb.PartStatus(spans=_SPANS)
            )
        ],
        **fields,
    }
    return pb.ReplicaStatus(**values)


def _text(replica: pb.ReplicaStatus) -> str:
    console = Console(file=StringIO(), width=120, highlight=False)
    for part in render(replica):
        console.print(part)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_what_was_predicted_stands_beside_what_happened() -> None:
    ready, first, token = comparisons(_replica())
    assert (ready.predicted_s, ready.happened_s) == (2.0, 2.5)
    assert ready.error == pytest.approx(-0.2)
    assert first.predicted_s == pytest.approx(3.6)
    assert first.happened_s == 3.0
    assert (token.happened_s, token.error) == (None, None)


def test_the_text_names_reason_node_layers_and_sources() -> None:
    text = _text(_replica())
    assert "tiny.1: 1 waits" in text
    assert "[0, 4)" in text
    assert "200 store" in text
    assert "2.000 / 1.000" in text, "the process, predicted and happened"


def test_a_successor_says_whose() -> None:
    replica = _replica(succeeds="tiny.0")
    replica.ClearField("prediction")
    text = _text(replica)
    assert "takes over from tiny.0" in text
    assert "Nothing was predicted" in text
