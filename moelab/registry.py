"""A folder of modules as a registry: a file's name is its `kind`, and the class that it defines is what is made."""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Iterable
from typing import Any


class Registry:
    """What a folder of kinds offers.

    Attributes:
      kinds: the files' names, sorted.
    """

    def __init__(self, package: str, path: Iterable[str], what: str, class_name: str):
        """Reads the folder without importing its files.

        Args:
          package: dotted name of the folder's package.
          path: its __path__.
          what: what an error calls a kind, as "router kind".
          class_name: the class that every file defines.
        """
        self._package, self._what, self._class_name = package, what, class_name
        self.kinds = tuple(sorted(module.name for module in pkgutil.iter_modules(path)))

    def module(self, kind: str) -> types.ModuleType:
        """Imports the file of a kind, or raises ValueError with the kinds that exist."""
        if kind not in self.kinds:
            allowed = ", ".join(self.kinds)
            raise ValueError(f"unknown {self._what} {kind!r}; choose from {allowed}")
        return importlib.import_module(f"{self._package}.{kind}")

    def make(self, kind: str, **fields) -> Any:
        """Builds the class of a kind; ValueError for an unknown kind, or for a field that it has not."""
        built = getattr(self.module(kind), self._class_name)
        linen = ("parent", "name")  # fields of every linen module, nobody's to set here
        fields_ = built.__dataclass_fields__.items()
        known = [name for name, field in fields_ if field.init and name not in linen]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(
                f"{self._what} {kind} has no field {unknown[0]!r}; fields: {', '.join(known) or 'none'}"
            )
        return built(**fields)
