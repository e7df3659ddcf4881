from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from paraserve_backend.weights.tiers.memory import Tier
from tests.support.checkpoints import write_checkpoint
from tests.support.stores import ACCESS_KEY, SECRET_KEY


@pytest.fixture
def aws_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test stores' credentials, and nothing of what the machine has."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of 4 layers in 2 shards."""
    return write_checkpoint(tmp_path / "model", shards=2)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    tier = Tier.open(tmp_path / "tier")
    yield tier
    assert tier.check_integrity() == ()
    tier.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: more threads only wait for each other, far longer on a busy machine."""
    import torch  # not there where only the rest is tested

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
