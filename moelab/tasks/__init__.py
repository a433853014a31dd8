"""Each file here is an evaluation beyond the loss; the file's name is its `kind` and the folder is the registry.

    moelab eval --workdir=runs/demo --tasks=facts,recall

A file defines a frozen dataclass `Task` with the methods of `task.Task` and defaults for all its fields. Every row has
a chance level and an interval, and is computed in every precision that is evaluated.
"""

from __future__ import annotations

from moelab.registry import Registry

_registry = Registry(__name__, __path__, "task", "Task")
KINDS, module, make = _registry.kinds, _registry.module, _registry.make
