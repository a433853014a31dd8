"""Each file here is a router: `make("top_k", num_experts=8, k=2)` is `top_k.Router(num_experts=8, k=2)`.

The file's name is the router's `kind` and the folder is the registry. A file defines `Router`, a subclass of
`router.Router` (which says what a router declares) whose fields a config may set, and

    __call__(x_TD, inputs: RouterInput, selection_bias_C) -> Routing

It may define `validate(fields, config) -> list[(field, message)]`, asked before anything is compiled.
"""

from __future__ import annotations

import importlib
import pkgutil

KINDS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def module(kind: str):
    """Imports the file of a router, or raises ValueError with the kinds that exist."""
    if kind not in KINDS:
        raise ValueError(f"unknown router kind {kind!r}; choose from {', '.join(KINDS)}")
    return importlib.import_module(f"{__name__}.{kind}")


def make(kind: str, **fields):
    """Builds the router of that kind."""
    return module(kind).Router(**fields)
