"""Each file here is a router: `make("top_k", num_experts=8, k=2)` is `top_k.Router(num_experts=8, k=2)`.

The file's name is the router's `kind` and the folder is the registry. A file defines `Router`, a subclass of
`router.Router` (which says what a router declares) whose fields a config may set, and

    __call__(x_TD, inputs: RouterInput, selection_bias_C) -> Routing

It may define `validate(fields, config) -> list[(field, message)]`, asked before anything is compiled. For routers made
from Python, `make` asks it with a config that has `moe.num_experts` alone.
"""

from __future__ import annotations

from moelab import router
from moelab.registry import Registry

_registry = Registry(__name__, __path__, "router kind", "Router")
KINDS, module = _registry.kinds, _registry.module


def declare(kind: str, **fields) -> router.Router:
    """Builds a router for what it declares, with whatever fields; it may refuse to route."""
    return _registry.make(kind, **fields)


def make(kind: str, **fields) -> router.Router:
    """Builds a router; ValueError for an unknown kind, and for a field that it has not or whose value is wrong."""
    made = declare(kind, **fields)
    router.refuse(made)
    return made
