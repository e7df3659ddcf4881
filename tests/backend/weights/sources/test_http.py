"""Ranged reads over one connection, with bodies large enough for long sleeps between wakings."""

from __future__ import annotations

import random

from paraserve_backend.weights.sources.base import StoredObject
from paraserve_backend.weights.sources.open import open_source
from tests.support.stores import BUCKET, ScriptedStore, serve

#: Around what one waking brings, and around where the end of an answer is near.
SIZES = (1, 128 << 10, 256 << 10, (392 << 10) - 1, 392 << 10, (392 << 10) + 1, 1_500_000, 3)


def test_answers_of_any_size_follow_each_other_on_one_connection(
    aws_environment: None,
) -> None:
    content = random.Random(3).randbytes(2_000_000)
    store = ScriptedStore({"tiny/weights.bin": content})
    stored = StoredObject(
        key="weights.bin",
        size_bytes=len(content),
        version=store.etags["tiny/weights.bin"].strip('"'),
    )
    with serve(store) as url:
        connection = open_source(f"s3://{BUCKET}/tiny", endpoint_url=url).connect()
        for start, size in enumerate(SIZES):
            buffer = bytearray(size)
            connection.read_into(stored, start, memoryview(buffer))
            assert buffer == content[start : start + size]
        connection.close()
    assert len({get.client_port for get in store.gets}) == 1
    assert len(store.gets) == len(SIZES)
