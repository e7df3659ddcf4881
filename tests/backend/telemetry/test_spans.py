from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.protocol.span_messages import read_span, span_message
from paraserve_backend.telemetry.spans import Span, SpanFile, SpanName

_DETAILED = {
    SpanName.FETCH_FROM: ("tier", "disk", "peers", "store"),
    SpanName.BIND: ("slot-0.front", "stage1"),
    SpanName.LOAD: ("tiny.1", "tiny.1.stage0", "generate"),
    SpanName.READY: ("[0, 16)",),
    SpanName.START_ENGINE: ("vllm", "tensorrt-llm"),
}
_WRITTEN = [(name, "") for name in SpanName if name not in _DETAILED] + [
    (name, detail) for name, details in _DETAILED.items() for detail in details
]


@pytest.mark.parametrize(("name", "detail"), _WRITTEN)
def test_a_span_comes_back_from_its_label(name: SpanName, detail: str) -> None:
    span = Span(name=name, detail=detail, start_s=1.0, end_s=2.5, size_bytes=3)
    assert Span.parse(span.label, start_s=1.0, end_s=2.5, size_bytes=3) == span
    assert read_span(span_message(span)) == span


@given(st.text() | st.sampled_from(SpanName).flatmap(lambda name: st.text().map(f"{name}".__add__)))
def test_a_label_is_never_changed_by_reading_it(label: str) -> None:
    assert Span.parse(label, start_s=1.0, end_s=2.0).label == label


@pytest.mark.parametrize("label", ["compile kernels", "fetch keys", "reload tiny.1", "Fetch", ""])
def test_a_name_that_only_a_newer_node_knows_is_kept_as_it_is(label: str) -> None:
    span = Span.parse(label, start_s=1.0, end_s=2.0)
    assert (span.name, span.detail) == (None, label)


def test_words_of_the_past_are_still_read() -> None:
    """What lies in state files and comes from nodes of an earlier version."""
    labels = ["fetch", "fetch from peers", "bind slot-3.link", "load tiny.1.stage0", "start vllm"]
    spans = [Span.parse(label, start_s=1.0, end_s=2.0) for label in labels]
    assert [(span.name, span.detail) for span in spans] == [
        (SpanName.FETCH, ""),
        (SpanName.FETCH_FROM, "peers"),
        (SpanName.BIND, "slot-3.link"),
        (SpanName.LOAD, "tiny.1.stage0"),
        (SpanName.START_ENGINE, "vllm"),
    ]


def test_a_file_has_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    file = SpanFile(path)
    assert file.read() == ()
    span = Span(name=SpanName.LOAD, detail="tiny.1", start_s=1.0, end_s=2.0, size_bytes=3)
    file.append(span)
    with file.span(SpanName.START_ENGINE, "vllm"):
        pass
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"name": "load tiny.1", "start_s": 1.0, "end_s": 2.0, "size_bytes": 3}
    assert second["name"] == "start vllm"
    assert second["start_s"] <= second["end_s"]
    assert file.read()[0] == span
