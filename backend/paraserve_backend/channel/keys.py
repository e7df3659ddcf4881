"""CURVE key pairs of deployments, as files that only this user can read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.daemon.private_files import create_file, make_folder
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb


class KeyStore:
    """A file for each replica: the public key, then the secret one, a line each."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir

    def write(self, replica: str, keys: pb.ChannelKeys) -> None:
        path = self._run_dir.key_file(replica)
        for folder in (self._run_dir.path, self._run_dir.keys, path.parent):
            make_folder(folder)
        # A fresh name: nobody can have put a readable file there before us.
        path.unlink(missing_ok=True)
        with open(create_file(path), "w", encoding="ascii") as file:
            file.write(f"{keys.public_key}\n{keys.secret_key}\n")

    def remove(self, replica: str) -> None:
        shutil.rmtree(self._run_dir.key_file(replica).parent, ignore_errors=True)

    def clear(self) -> None:
        shutil.rmtree(self._run_dir.keys, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CurveKeys:
    """One deployment's key pair, Z85."""

    public: bytes
    secret: bytes

    @classmethod
    def read(cls, path: Path) -> CurveKeys:
        """Read the file the agent wrote: the public key, then the secret one, a line each."""
        lines = path.read_bytes().split()
        if len(lines) != 2:
            raise InvalidRequest("The channel's key file is malformed; remove the replica.")
        return cls(public=lines[0], secret=lines[1])
