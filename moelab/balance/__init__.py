"""Each file here is a balancing mechanism; the file's name is its `kind` and the folder is the registry.

A file defines a frozen dataclass `Mechanism`, whose first field is its strength (0: off), with the methods of
`balancing.Mechanism`. A loss is pure in the routing of one batch of tokens; state changes only in `update`, once per
optimizer step, on statistics of the whole global batch. It may define
`validate(fields, config) -> list[(field, message)]`, asked where its strength is not 0.
"""

from __future__ import annotations

from moelab.registry import Registry

_registry = Registry(__name__, __path__, "balancing mechanism", "Mechanism")
KINDS, module, make = _registry.kinds, _registry.module, _registry.make
