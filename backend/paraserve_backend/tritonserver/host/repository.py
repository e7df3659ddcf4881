"""The node's model repository on disk: models appear in it, and disappear from it, as a whole.

A marker file tells our models from others, which are never touched. Nothing is loaded here.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from paraserve_backend.errors import AlreadyExists, InvalidRequest

_MARKER = ".paraserve"
#: Begins the names of half-written models; not a valid model name.
_NEW = ".new-"
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")


class ModelRepository:
    """Triton's --model-repository. Blocking; the folder must exist or be creatable."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, name: str, files: Mapping[str, bytes]) -> None:
        """Make model `name` of `files` (path in its folder -> content), all at once.

        Raises:
            InvalidRequest: the name or a path is not one we allow.
            AlreadyExists: somebody else's model has this name.
        """
        check_name(name)
        paths = {_checked(name, path): content for path, content in files.items()}
        new = self._path / f"{_NEW}{name}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        (new / _MARKER).touch()
        for path, content in paths.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_bytes(content)
        self._require_ours(name)
        self.remove(name)
        # Triton must never see half a model.
        new.rename(self._path / name)

    def remove(self, name: str) -> None:
        """Delete a model of ours; a missing one, or somebody else's, is left as it is."""
        if (self._path / name / _MARKER).exists():
            shutil.rmtree(self._path / name)

    def ours(self) -> tuple[str, ...]:
        """Return the names of the models we wrote, in this life or an earlier one."""
        return tuple(
            sorted(
                marker.parent.name
                for marker in self._path.glob(f"*/{_MARKER}")
                if not marker.parent.name.startswith(_NEW)
            )
        )

    def remove_unfinished(self) -> None:
        """Delete what a killed agent left half-written."""
        for new in self._path.glob(f"{_NEW}*"):
            shutil.rmtree(new)

    def _require_ours(self, name: str) -> None:
        folder = self._path / name
        if folder.exists() and not (folder / _MARKER).exists():
            raise AlreadyExists(
                f"The model repository already holds a model {name} that is not ParaServe's: "
                "rename the deployment."
            )


def check_name(name: str) -> None:
    """Refuse a model or replica name that is not lower-case letters, digits, dots and dashes.

    Raises:
        InvalidRequest: with the name.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"{name!r} cannot name a model: use lower-case letters, digits, dots and dashes."
        )


def _checked(model: str, path: str) -> PurePosixPath:
    parts = path.split("/")
    if not all(parts) or "\0" in path or any(part in (".", "..", _MARKER) for part in parts):
        raise InvalidRequest(f"Model {model} has a file {path!r}, which is not inside its folder.")
    return PurePosixPath(path)
