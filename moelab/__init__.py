"""moelab: a JAX toolkit for sparse Mixture-of-Experts language models.

>>> import moelab
>>> loaded = moelab.load_config("experiments/demo.py", ["router.k=4"])
>>> result = moelab.run(loaded.config, "runs/demo_k4")  # doctest: +SKIP

Importing the package is cheap: each name below, and each submodule, is imported when it is first used.
"""

from __future__ import annotations

import importlib
import pkgutil

__version__ = "0.1.0"

# Public name -> (submodule, name in it).
_NAMES = {
    "prepare": ("environment", "prepare"),
    "run": ("launch", "run"),
    "load_config": ("config", "load"),
    "from_dict": ("config", "from_dict"),
    "validate": ("config", "validate"),
    "ConfigError": ("errors", "ConfigError"),
    "Result": ("train", "Result"),
    "Routing": ("routing", "Routing"),
    "RouterInput": ("routing", "RouterInput"),
}
_MODULES = frozenset(module.name for module in pkgutil.iter_modules(__path__)) - {"__main__"}

__all__ = [*_NAMES, *sorted(_MODULES)]


def __getattr__(name: str):
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
