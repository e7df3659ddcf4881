import os
import threading
from pathlib import Path

import pytest

from integration.support import memory

STEP_BYTES = 8 << 20


def test_a_reserve_is_given_back_as_memory_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    least_bytes = 100 * STEP_BYTES
    free_bytes = iter([least_bytes, least_bytes - 1, least_bytes, least_bytes - 3 * STEP_BYTES])
    sizes = []
    with (tmp_path / "reserve").open("w+b", buffering=0) as file:
        file.truncate(4 * STEP_BYTES)

        def look() -> int:
            sizes.append(os.fstat(file.fileno()).st_size // STEP_BYTES)
            return next(free_bytes)

        monkeypatch.setattr(memory, "_free_bytes", look)
        memory._give_back(file, 4, least_bytes, threading.Event())
        assert os.fstat(file.fileno()).st_size == 0
    assert sizes == [4, 4, 3, 3]
