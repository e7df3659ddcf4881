"""Spans as agents report them and as the scheduler passes them on."""

from __future__ import annotations

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import Span


def span_message(span: Span) -> pb.Span:
    return pb.Span(name=span.label, start_s=span.start_s, end_s=span.end_s, bytes=span.size_bytes)


def read_span(message: pb.Span) -> Span:
    return Span.parse(
        message.name, start_s=message.start_s, end_s=message.end_s, size_bytes=message.bytes
    )
