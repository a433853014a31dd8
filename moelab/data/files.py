"""Finding users' files, knowing them by content without reading them twice, and writing whole files or none.

A file's sha256 is remembered under its path, size and modification time, so that opening a large
corpus again costs one `stat` per file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time

from moelab import atomic
from moelab.data.document import DataError
from moelab.spelling import hint

# A file changed within this time of being hashed may change again under the same time stamp.
SETTLED_NANOSECONDS = 2_000_000_000


def existing(path: str) -> pathlib.Path:
    """Returns the path that a user gave, relative to the working folder.

    Raises:
      DataError: it is empty or does not exist; the nearest names beside it are listed.
    """
    if not path:
        raise DataError("data.path is empty: give the file or folder, --config.data.path=...")
    found = pathlib.Path(path).expanduser()
    if found.exists():
        return found
    parent = found.parent
    if not parent.is_dir():
        raise DataError(f"data.path {path}: there is no folder {parent}")
    names = sorted(item.name for item in parent.iterdir())
    near = hint(found.name, names)
    listing = (
        f"; {parent} has: {', '.join(names[:8])}{' ...' if names[8:] else ''}" if names else ""
    )
    raise DataError(f"data.path {path}: no such file or folder{near or listing}")


def select(root: pathlib.Path, patterns: tuple[str, ...]) -> list[tuple[str, pathlib.Path]]:
    """Lists (name relative to root, file) of a folder's files that match, or the one file itself.

    Raises:
      DataError: nothing matches, or a name is not UTF-8.
    """
    if root.is_file():
        check_name(root.name, root)
        return [(root.name, root)]
    found: dict[str, pathlib.Path] = {}
    for pattern in patterns:
        try:
            matches = [path for path in root.glob(pattern) if path.is_file()]
        except (ValueError, NotImplementedError) as error:
            raise DataError(f"data.pattern {pattern!r}: {error}") from error
        found |= {path.relative_to(root).as_posix(): path for path in matches}
    if not found:
        endings = sorted({path.suffix or path.name for path in root.rglob("*") if path.is_file()})
        raise DataError(
            f"{root}: no file matches {' or '.join(patterns)}; "
            + (f"it has files ending in {', '.join(endings[:8])}" if endings else "it has no files")
        )
    for name, path in found.items():
        check_name(name, path)
    return sorted(found.items())


def check_name(name: str, path: pathlib.Path) -> None:
    """Checks that a name can be a domain or an id.

    Raises:
      DataError: it has bytes that are not UTF-8.
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:  # Python carries such bytes as half surrogate pairs
        raise DataError(
            f"{os.fsencode(path)!r}: the name is not UTF-8, and it names the documents; rename it"
        ) from error


def digest(path: pathlib.Path) -> str:
    """Returns the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(selection: list[tuple[str, pathlib.Path]], memory: pathlib.Path) -> dict[str, str]:
    """Returns {relative name: sha256}, from the memory where path, size and time are unchanged.

    Args:
      selection: as select() returns it.
      memory: a folder of the cache; it may be unwritable, then nothing is remembered.
    """
    stamps = {}
    for name, path in selection:
        status = path.stat()
        stamps[name] = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()
    remembered = memory / f"{key[:32]}.json"
    if remembered.is_file():
        return json.loads(remembered.read_text())
    started = time.time_ns()
    result = {name: digest(path) for name, path in selection}
    if all(started - stamp[2] > SETTLED_NANOSECONDS for stamp in stamps.values()):
        with contextlib.suppress(OSError):  # an unwritable cache costs time, nothing else
            atomic.write_text(remembered, json.dumps(result))
    return result
