"""Each file here is a balancing mechanism; the file's name is its `kind` and the folder is the registry.

A file defines a frozen dataclass `Mechanism`, whose first field is its strength (0: off), with the methods of
`balancing.Mechanism`. A loss is pure in the routing of one batch of tokens; state changes only in `update`, once per
optimizer step, on statistics of the whole global batch. It may define
`validate(fields, config) -> list[(field, message)]`, asked where its strength is not 0.
"""

from __future__ import annotations

import importlib
import pkgutil

KINDS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def module(kind: str):
    """Imports the file of a mechanism, or raises ValueError with the kinds that exist."""
    if kind not in KINDS:
        raise ValueError(f"unknown balancing mechanism {kind!r}; choose from {', '.join(KINDS)}")
    return importlib.import_module(f"{__name__}.{kind}")


def make(kind: str, **fields):
    """Builds the mechanism of that kind."""
    return module(kind).Mechanism(**fields)
