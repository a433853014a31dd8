"""Which tensor role is kept and multiplied in which format, by name. No jax here: config checks read this file.

A name ends in _w where only the weights are quantized and in _wa where the activations are too.
"""

from __future__ import annotations

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The formats of one way to run a model.

    Attributes:
      name: what a config says.
      label: what a table says.
      expert_weight: format of the routed experts' matrices: float32, bfloat16 or a key of pallas_kernels' FORMATS.
      expert_activation: format of the rows that enter them; None: left in compute_dtype.
      compute_dtype: of the rest of the model, float32 or bfloat16. Packed recipes keep float32, so that a difference
        in the loss comes from the experts' formats alone.
      activation_scale: whose amax scales an activation: per_token depends on neither later tokens nor the batch
        (DESIGN 7); per_tensor leaks both.
      rule: how a block's scale is rounded; None: the format's own rule.
    """

    name: str
    label: str
    expert_weight: str
    expert_activation: str | None = None
    compute_dtype: str = "float32"
    activation_scale: str = "per_token"
    rule: str | None = None

    @property
    def packed(self) -> bool:
        """Whether the experts' weights are kept in a block-scaled format."""
        return self.expert_weight not in ("float32", "bfloat16")


def _pair(name: str, label: str, format: str) -> tuple[Recipe, Recipe]:
    weights = Recipe(name=f"{name}_w", label=f"{label} weights", expert_weight=format)
    both = dataclasses.replace(
        weights,
        name=f"{name}_wa",
        label=f"{label} weights + activations",
        expert_activation=format,
    )
    return weights, both


_RECIPES = (
    Recipe(name="float32", label="float32", expert_weight="float32"),
    Recipe(name="bf16", label="bf16", expert_weight="bfloat16", compute_dtype="bfloat16"),
    # E4M3 with one float32 scale per output row of a weight, per token of an activation.
    *_pair("fp8", "FP8", "fp8_channel"),
    *_pair("mxfp8", "MXFP8", "mxfp8_e4m3"),
    *_pair("mxfp4", "MXFP4", "mxfp4"),
    *_pair("nvfp4", "NVFP4", "nvfp4"),
)
_BY_NAME = {recipe.name: recipe for recipe in _RECIPES}
NAMES = tuple(_BY_NAME)


def get(name: str) -> Recipe:
    """Returns the recipe of that name.

    Raises:
      ValueError: there is none; the message has the closest name.
    """
    if name not in _BY_NAME:
        close = difflib.get_close_matches(name, NAMES, n=1)
        guess = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(NAMES)}"
        raise ValueError(f"unknown recipe {name!r}; {guess}")
    return _BY_NAME[name]
