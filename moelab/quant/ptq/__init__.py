"""Post-training quantization of expert weights: each file here is a method, `make("gptq", damping=0.02)` builds it.

The file's name is the method's `kind` and the folder is the registry. A file defines `Method`, a frozen dataclass and
subclass of `method.Method`, whose fields a caller may set, and fills in

    apply(weights, statistics, format, rule) -> LayerResult

>>> from moelab.quant import ptq
>>> rest, quantized, report = ptq.quantize_params(params, ptq.make("rtn"), None, "nvfp4")
"""

from __future__ import annotations

import importlib
import pkgutil

KINDS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def module(kind: str):
    """Imports the file of a method, or raises ValueError with the kinds that exist."""
    if kind not in KINDS:
        raise ValueError(f"unknown PTQ method {kind!r}; choose from {', '.join(KINDS)}")
    return importlib.import_module(f"{__name__}.{kind}")


def make(kind: str, **fields):
    """Builds the method of that kind; ValueError for a field that it has not, or a value that it cannot take."""
    method = module(kind).Method
    known = method.__dataclass_fields__
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(
            f"PTQ method {kind} has no field {unknown[0]!r}; fields: {', '.join(known) or 'none'}"
        )
    return method(**fields)


def __getattr__(name: str):
    # Late, since config checks read the kinds and must not wait for jax.
    if name == "quantize_params":
        from moelab.quant import post_training

        return post_training.quantize_params
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
