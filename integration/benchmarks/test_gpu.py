"""The GPU benchmark runs to its end, on the CPU; where there is no GPU it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from integration.benchmarks.gpu import TARGETS


def last_line(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "integration.benchmarks.gpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_is_skipped_without_a_gpu() -> None:
    status, line = last_line()
    assert (status, line["bench"]) == (0, "gpu")
    assert "no CUDA GPU" in line["skipped"]


# Two minutes where nothing else runs, six beside twenty other processes on two cores.
@pytest.mark.timeout(3600)
def test_every_step_of_it_runs_on_a_cpu() -> None:
    status, line = last_line("--device", "cpu", "--shape", "tiny")
    figures = line["figures"]
    assert figures["stages_agree"] == 1.0
    assert all(figures[name] > 0 for name in TARGETS)
    assert min(figures[f"cold_start_{stages}_s"] for stages in (1, 2, 4)) > 0
    assert line["met"] is not bool(line["missed"])
    assert status == (0 if line["met"] else 1)
