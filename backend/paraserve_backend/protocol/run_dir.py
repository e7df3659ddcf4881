"""Paths below an agent's run_dir, where it leaves what the processes of its models read. Pure.

tier/                                   host memory: `weights.tiers.layout` says what is in it
tier/fetches/<fetch_id>/spans.jsonl     what the readers of a fetch have measured
keys/<replica>/curve.key                what a replica's models talk to other replicas with
secrets/<model>                         what commands to a Triton model must carry; 0600
pulses/<model>                          touched by a Triton model's generate loop while it turns
loaded/<model>                          made by a Triton model's process once it could serve
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TierDir:
    """A host-memory tier's folder; a standalone model has one without an agent."""

    path: Path

    @property
    def fetches(self) -> Path:
        return self.path / "fetches"

    def fetch(self, fetch_id: str) -> Path:
        return self.fetches / fetch_id

    def spans(self, fetch_id: str) -> Path:
        return self.fetch(fetch_id) / "spans.jsonl"


#: What may lie in a run_dir.
RUN_DIR_ENTRIES = ("tier", "keys", "secrets", "pulses", "loaded")


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    @property
    def tier(self) -> TierDir:
        return TierDir(self.path / "tier")

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    def key_file(self, replica: str) -> Path:
        return self.keys / replica / "curve.key"

    @property
    def secrets(self) -> Path:
        return self.path / "secrets"

    def secret_file(self, model: str) -> Path:
        return self.secrets / model

    @property
    def pulses(self) -> Path:
        return self.path / "pulses"

    def pulse_file(self, model: str) -> Path:
        return self.pulses / model

    @property
    def loaded(self) -> Path:
        return self.path / "loaded"

    def loaded_file(self, model: str) -> Path:
        return self.loaded / model
