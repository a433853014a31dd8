"""Which operand of which product is quantized to which format. Plain values, hashable, so they can be static.

y = x w^T has three products: the forward one, the input gradient dx = dy w, and the weight gradient dw = dy^T x.
"""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels import formats
from pallas_kernels.formats.hadamard import BLOCKS

Weight = jax.Array | formats.BlockScaled
Bias = tuple[jax.Array | None, jax.Array | None]  # of gate and up (E, 2F), and of down (E, D)

X_SCALES = ("per_token", "per_group", "per_tensor", "static")
ROUNDINGS = ("nearest", "stochastic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulPrecision:
    """Formats of the operands of y = x w^T and of its gradients.

    Without `dy`, gradients are straight-through: those of the product of the values that x and w were rounded to, in
    float32. With it, all three products have quantized operands, each quantized along its own contraction axis from
    the unquantized operand: the input gradient dy and w along N, the weight gradient dy and x along the tokens.

    Attributes:
      x: key of `formats.FORMATS` for the activations; None leaves them in float.
      w: the same for plain weights. Weights that are already `BlockScaled` keep their own format. A 2D format has the
        same values in both directions; any other is quantized anew for the input gradient.
      dy: format of the output gradient in both backward products; None: straight-through.
      x_scale: what a global scale of x (NVFP4) comes from. "per_token": that row alone, so no token sees another.
        "per_group": the rows of its expert. "per_tensor": all rows that belong to a group. Both let a later token
        change an earlier one's result. "static": an amax per expert, passed in. Gradients have one per group.
      x_rule: scale rule of the activations and gradients; None is the format's default.
      w_rule: scale rule of the weights.
      rotation: block of a Hadamard transform of x and w along K before they are quantized, 16 to 128; None: none.
        Packed weights must have been rotated before they were packed.
      hadamard: block of a Hadamard transform with signs along the tokens, of both operands of the weight gradient.
      rounding: of the gradients: "nearest", or "stochastic", which needs a key. All else is rounded to nearest.

    Raises:
      ValueError: a name or block that does not exist, or fields that do not go together.
    """

    x: str | None = None
    w: str | None = None
    dy: str | None = None
    x_scale: str = "per_token"
    x_rule: str | None = None
    w_rule: str | None = None
    rotation: int | None = None
    hadamard: int | None = None
    rounding: str = "nearest"

    def __post_init__(self):
        for name in ("x", "w", "dy"):
            self._check_member(name, (*formats.FORMATS, None))
        self._check_member("x_scale", X_SCALES)
        self._check_member("rounding", ROUNDINGS)
        for name in ("rotation", "hadamard"):
            self._check_member(name, (*BLOCKS, None))
        for name, format in (("x_rule", self.x), ("w_rule", self.w)):
            if format is not None:
                self._check_member(name, (*formats.FORMATS[format].rules, None))
        if self.dy is None and (self.hadamard or self.rounding == "stochastic"):
            raise ValueError(
                "hadamard and rounding concern quantized gradients: dy must name a format"
            )
        if self.dy is not None and self.x is None:
            raise ValueError(
                "with a format for dy, x needs one too: both enter the weight gradient"
            )
        for name in ("x", "dy") if self.dy is not None else ():
            spec = formats.FORMATS[getattr(self, name)]
            if spec.block is None or spec.block_rows > 1:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no blocks along one axis; with quantized gradients x and dy "
                    "need a format that has, such as nvfp4, mxfp4, mxfp8_e4m3 or fp8_row128"
                )

    def _check_member(self, name: str, allowed: tuple) -> None:
        if getattr(self, name) not in allowed:
            names = ", ".join(map(str, allowed))
            raise ValueError(f"unknown {name} {getattr(self, name)!r}; allowed: {names}")

    @property
    def needs_key(self) -> bool:
        """Whether gradients are rounded at random."""
        return self.rounding == "stochastic"

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized here."""
        return self != PLAIN


PLAIN = MatmulPrecision()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpPrecision:
    """The precisions of a feed-forward's two layers.

    Attributes:
      gate_up: of the product with gate and up.
      down: of the product with down.
    """

    gate_up: MatmulPrecision = PLAIN
    down: MatmulPrecision = PLAIN

    @property
    def needs_key(self) -> bool:
        """Whether gradients are rounded at random."""
        return self.gate_up.needs_key or self.down.needs_key


def both(precision: MatmulPrecision | MlpPrecision | None) -> MlpPrecision:
    """Returns the precision of each layer: one value stands for both, None for plain float."""
    if isinstance(precision, MlpPrecision):
        return precision
    precision = PLAIN if precision is None else precision
    return MlpPrecision(gate_up=precision, down=precision)
