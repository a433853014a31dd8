"""Quantization: recipes name the format of each tensor role, `pack` turns parameters into packed weights.

>>> from moelab import quant
>>> recipe = quant.recipes.get("nvfp4_w")
>>> params, quantized = quant.pack(params, recipe)
>>> model.apply({"params": params, "quantized": quantized}, ...)
"""

from moelab.quant import recipes

__all__ = ["expert_bytes", "pack", "recipes", "unpack"]


def __getattr__(name: str):
    # Late, since config checks read the recipes and must not wait for jax.
    if name in ("pack", "unpack", "expert_bytes"):
        from moelab.quant import packing

        return getattr(packing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
