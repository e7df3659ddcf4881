from __future__ import annotations

import os
from pathlib import Path

from paraserve_backend.engines.pulse import Pulse


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def test_there_is_no_pulse_before_the_loop_turns_and_none_after(tmp_path: Path) -> None:
    path = tmp_path / "pulses" / "d.1"
    pulse = Pulse(path, Clock())
    assert not path.exists()
    pulse.beat()
    assert path.stat().st_mode & 0o777 == 0o600
    pulse.close()
    assert not path.exists()
    pulse.beat()
    assert not path.exists()


def test_it_is_touched_as_often_as_an_idle_loop_turns(tmp_path: Path) -> None:
    path, clock = tmp_path / "d.1", Clock()
    pulse = Pulse(path, clock)
    pulse.beat()
    os.utime(path, (0, 0))
    clock.now_s += 0.05
    pulse.beat()
    assert path.stat().st_mtime == 0
    clock.now_s += 0.2
    pulse.beat()
    assert path.stat().st_mtime > 0
    pulse.close()


def test_a_file_that_cannot_be_touched_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pulse = Pulse(tmp_path / "file" / "d.1", Clock())
    pulse.beat()
    pulse.beat()
    pulse.close()


def test_a_link_that_somebody_put_there_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "d.1").symlink_to(tmp_path / "elsewhere")
    pulse = Pulse(tmp_path / "d.1", Clock())
    pulse.beat()
    pulse.close()
    assert not (tmp_path / "elsewhere").exists()


def test_a_model_without_an_agent_has_no_pulse() -> None:
    pulse = Pulse(None)
    pulse.beat()
    pulse.close()
