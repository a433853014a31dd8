"""Each file here is a tool that scores documents and says which stay; its name is the `kind`.

A file defines a frozen dataclass `Filter`, a subclass of `contract.BaseFilter`, whose fields a config may set. A higher
score is a better document, whatever the tool.
"""

from __future__ import annotations

from moelab.registry import Registry

_registry = Registry(__name__, __path__, "filter", "Filter")
KINDS, module = _registry.kinds, _registry.module
