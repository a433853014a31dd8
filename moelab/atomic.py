"""Files that are there whole or not at all, whoever reads, fills the disk or kills the process meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from moelab.errors import UserError

_LONGEST_NAME = 255  # bytes, of the usual file systems


def write_text(path: Path | str, text: str) -> Path:
    """Writes a UTF-8 file by replacing it; what was there stays if that fails. Folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name[:64]}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def is_leftover(path: Path) -> bool:
    """Whether a file is what a process that was killed left half written."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def check_target(path: Path | str) -> None:
    """Refuses, before any work, a file that `write_text` could not write.

    Raises:
      UserError: it is a folder, its name is too long, or it lies in no folder that can be written.
    """
    path = Path(path)
    if len(path.name.encode(errors="surrogateescape")) > _LONGEST_NAME:
        raise UserError(f"{path.name[:40]}...: the name is longer than {_LONGEST_NAME} bytes")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{path} cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {folder} allows no new files")
