"""Post-training quantization of expert weights: each file here is a method, `make("gptq", damping=0.02)` builds it.

The file's name is the method's `kind` and the folder is the registry. A file defines `Method`, a frozen dataclass and
subclass of `method.Method`, whose fields a caller may set, and fills in

    apply(weights, statistics, format, rule) -> LayerResult

>>> from moelab.quant import ptq
>>> rest, quantized, report = ptq.quantize_params(params, ptq.make("rtn"), None, "nvfp4")
"""

from __future__ import annotations

from moelab.registry import Registry

_registry = Registry(__name__, __path__, "PTQ method", "Method")
KINDS, module, make = _registry.kinds, _registry.module, _registry.make


def __getattr__(name: str):
    # Late, since config checks read the kinds and must not wait for jax.
    if name == "quantize_params":
        from moelab.quant import post_training

        return post_training.quantize_params
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
