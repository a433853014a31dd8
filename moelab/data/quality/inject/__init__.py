"""Each file here is a kind of dirt; its name is the `kind`, and the label of the documents that it makes.

A file defines a frozen dataclass `Injector`, a subclass of `contract.BaseInjector`, whose fields a config may set. What
changes a document in place takes `share` of the documents; what adds text takes `share` of the bytes that result.
"""

from __future__ import annotations

from moelab.registry import Registry

_registry = Registry(__name__, __path__, "injector", "Injector")
KINDS, module = _registry.kinds, _registry.module
