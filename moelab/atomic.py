"""Files that are there whole or not at all, whoever reads, fills the disk or kills the process meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from moelab.errors import UserError

_PREFIX = ".tmp-"


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Gives the path of a file to write, which then takes the place of `path`; on an error it is removed.

    It has the suffix of `path`. What was there keeps its permissions, and a link to it stays one.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{_PREFIX}{uuid.uuid4().hex}{path.suffix[:16]}")
    try:
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> Path:
    """Writes a UTF-8 file; folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def is_leftover(path: Path) -> bool:
    """Whether a file is what a process that was killed left half written."""
    return path.name.startswith(_PREFIX)


def check_target(path: Path | str, option: str = "--out", *, make_folders: bool = False) -> None:
    """Refuses, before the work, a file that its result could not be written to.

    Args:
      path: of the file, which need not be there.
      option: the one that gave the path, for the message.
      make_folders: whether its folder will be made.

    Raises:
      UserError: it is no file, its folder is not there, or the system refuses to write.
    """
    found = Path(os.path.realpath(path))
    try:
        if found.exists() and not found.is_file():
            what = "a folder" if found.is_dir() else "no ordinary file"
            raise UserError(f"{option}={path} is {what}; a file was wanted")
        if found.exists() and not os.access(found, os.W_OK):
            raise UserError(f"{option}={path} cannot be written: it is read-only")
        folder = found.parent
        while make_folders and not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "is not there"
            raise UserError(f"{option}={path} cannot be written: the folder {folder} {what}")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{option}={path} cannot be written: {error.strerror}") from error
