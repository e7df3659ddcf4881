"""Daemons that cannot start: one sentence on standard error, exit status 1, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from integration.bad_input.bad_settings import SETTINGS, BadFile
from integration.support.limits import HANG_S
from integration.support.refusals import each


@each(SETTINGS)
def test_a_bad_settings_file(tmp_path: Path, case: BadFile) -> None:
    path = tmp_path / "settings.yaml"
    if case.content is not None:
        path.write_bytes(case.content)
    command = [sys.executable, "-m", "paraserve_scheduler.cli", case.daemon, "--config", str(path)]
    environ = {key: value for key, value in os.environ.items() if key != "PARASERVE_TOKEN"}
    done = subprocess.run(
        command,
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    _, sentence = case.expected(path=path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"paraserve: {sentence}\n")
    assert [left.name for left in tmp_path.iterdir()] in ([], ["settings.yaml"])
