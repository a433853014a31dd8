"""Which tensor role is kept and multiplied in which format, by name. No jax here: config checks read this file.

Two families of names. What a table evaluates: float32, bf16, and FORMAT_w (weights of the routed experts only),
FORMAT_wa (their activations too), FORMAT_kv (the key-value cache only). What a run trains with or `moelab quantize`
makes: none, w4a16, w4a8, w4a4, nvfp4_qat, mxfp4_qat, nvfp4_training, fp8_block.
"""

from __future__ import annotations

import dataclasses
import difflib

# Every quantizable tensor role, and which of its parts can be quantized. Norms and the softmax never are.
ROLES = {
    "expert_gate_up": ("weight", "activation", "gradient"),
    "expert_down": ("weight", "activation", "gradient"),
    "shared_experts": ("weight", "activation", "gradient"),
    "dense_mlp": ("weight", "activation", "gradient"),
    "attention": ("weight", "activation", "gradient"),
    "router": ("weight", "activation"),
    "embedding": ("weight",),
    "head": ("weight", "activation"),
    "kv_cache": ("activation",),
}
EXPERT_ROLES = ("expert_gate_up", "expert_down")
ACTIVATION_SCALES = ("per_token", "per_group", "per_tensor", "static")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """The formats of one role: keys of pallas_kernels' FORMATS; None stays in the compute dtype.

    Attributes:
      weight: of the parameters.
      activation: of what is multiplied with them (kv_cache: of what is kept).
      gradient: of the output gradient, in both backward products; None: straight-through.
    """

    weight: str | None = None
    activation: str | None = None
    gradient: str | None = None


PLAIN = Formats()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The formats of one way to run a model.

    Attributes:
      name: what a config says.
      label: what a table says.
      expert_gate_up, expert_down: the routed experts' two matrices.
      shared_experts: the experts that every token passes.
      dense_mlp: the feed-forward of layers without experts.
      attention: query, key, value and output projections.
      router: its parameters and input; the product stays float32.
      embedding: the table.
      head: the output matrix and its input.
      kv_cache: keys and values, one scale per token and head.
      compute_dtype: of the rest of the model, float32 or bfloat16. Quantized recipes keep float32, so that a difference
        in the loss comes from the formats alone.
      activation_scale: whose amax scales an activation (NVFP4): per_token depends on neither later tokens nor the batch
        (DESIGN 7); per_group and per_tensor leak both; static is calibrated, per expert.
      weight_rule, activation_rule: how a block's scale is rounded; None: the format's own rule.
      rotation: block of a Hadamard transform before the experts' products (MR-GPTQ); None: none.
      hadamard: block of the transform along the tokens in the weight gradient; None: none.
      rounding: of gradients, nearest or stochastic.
    """

    name: str
    label: str
    expert_gate_up: Formats = PLAIN
    expert_down: Formats = PLAIN
    shared_experts: Formats = PLAIN
    dense_mlp: Formats = PLAIN
    attention: Formats = PLAIN
    router: Formats = PLAIN
    embedding: Formats = PLAIN
    head: Formats = PLAIN
    kv_cache: Formats = PLAIN
    compute_dtype: str = "float32"
    activation_scale: str = "per_token"
    weight_rule: str | None = None
    activation_rule: str | None = None
    rotation: int | None = None
    hadamard: int | None = None
    rounding: str = "nearest"

    @property
    def packed(self) -> bool:
        """Whether the experts' weights are kept in a block-scaled format."""
        return any(getattr(self, role).weight for role in EXPERT_ROLES)

    @property
    def quantizes(self) -> bool:
        """Whether any role is quantized."""
        return any(getattr(self, role) != PLAIN for role in ROLES)

    @property
    def expert_weight(self) -> str:
        """What a table says of the experts' weights: a format, or the compute dtype."""
        return self.expert_gate_up.weight or self.expert_down.weight or self.compute_dtype

    @property
    def expert_activation(self) -> str | None:
        """What a table says of the experts' activations."""
        return self.expert_gate_up.activation or self.expert_down.activation

    @property
    def activation_label(self) -> str | None:
        """The activations' format, the key-value cache's with its name."""
        cache = self.kv_cache.activation
        return self.expert_activation or (f"{cache} cache" if cache else None)

    @property
    def leak(self) -> str:
        """Why outputs depend on later tokens; empty where they do not."""
        activations = (getattr(self, role).activation or "" for role in ROLES if role != "kv_cache")
        shared = any(a.startswith("nvfp4") or a == "fp8_tensor" for a in activations)
        if self.activation_scale not in ("per_group", "per_tensor") or not shared:
            return ""
        return f"activations share a scale {self.activation_scale}, which later tokens enter"

    def without_experts_weights(self) -> Recipe:
        """The recipe as a model computes it whose experts' weights were rounded before, and no name.

        Where activations stay plain, rounded weights are multiplied as they are, their rotation undone.
        """
        experts = {
            role: dataclasses.replace(getattr(self, role), weight=None) for role in EXPERT_ROLES
        }
        plain = all(formats == PLAIN for formats in experts.values())
        unused = dict(rotation=None, weight_rule=None) if plain else {}
        return dataclasses.replace(self, name="", label="", **experts, **unused)


def experts(formats: Formats, **fields) -> dict[str, Formats]:
    """Returns the fields of a recipe that gives both expert matrices the same formats."""
    return {role: formats for role in EXPERT_ROLES} | fields


def feed_forwards(formats: Formats) -> dict[str, Formats]:
    """Returns the fields of a recipe for everything that is a feed-forward: routed, shared, dense."""
    return experts(formats, shared_experts=formats, dense_mlp=formats)


def _weights(name: str, label: str, format: str, **fields) -> Recipe:
    return Recipe(
        name=f"{name}_w", label=f"{label} weights", **experts(Formats(weight=format)), **fields
    )


def _both(name: str, label: str, format: str, activation: str | None = None, **fields) -> Recipe:
    formats = Formats(weight=format, activation=activation or format)
    label = f"{label} weights + activations"
    return Recipe(name=f"{name}_wa", label=label, **experts(formats), **fields)


def _table() -> tuple[Recipe, ...]:
    rows = [
        Recipe(name="float32", label="float32"),
        Recipe(name="bf16", label="bf16", compute_dtype="bfloat16"),
    ]
    # E4M3 with one float32 scale per output row of a weight, per token of an activation.
    for name, label, format in (
        ("fp8", "FP8", "fp8_channel"),
        ("mxfp8", "MXFP8", "mxfp8_e4m3"),
        ("mxfp4", "MXFP4", "mxfp4"),
        ("nvfp4", "NVFP4", "nvfp4"),
        ("nvfp4_46", "NVFP4 4/6", "nvfp4_46"),
        ("int4", "INT4", "int4_group"),
    ):
        rows += [_weights(name, label, format), _both(name, label, format)]
    for rule in ("floor", "even", "ceil"):  # rceil is the format's own
        label, rules = f"MXFP4 {rule}", dict(weight_rule=rule, activation_rule=rule)
        rows.append(_weights(f"mxfp4_{rule}", label, "mxfp4", weight_rule=rule))
        rows.append(_both(f"mxfp4_{rule}", label, "mxfp4", **rules))
    # DeepSeek-V3's tiles: 128 x 128 for weights, 1 x 128 for activations.
    rows += [
        _weights("fp8_block", "FP8 blocks", "fp8_block"),
        _both("fp8_block", "FP8 blocks", "fp8_block", "fp8_row128"),
    ]
    for name, label in (("nvfp4", "NVFP4"), ("mxfp4", "MXFP4"), ("mxfp8", "MXFP8")):
        format = "mxfp8_e4m3" if name == "mxfp8" else name
        cache = Formats(activation=format)
        rows.append(Recipe(name=f"{name}_kv", label=f"{label} key-value cache", kv_cache=cache))
    return tuple(rows)


def _named(format: str) -> tuple[Recipe, ...]:
    """The recipes of training and of `moelab quantize`; w4a16, w4a8 and w4a4 in a 4-bit format."""
    wide = "mxfp8_e4m3" if format.startswith("mxfp4") else "fp8_channel"
    fake = {f: Formats(weight=f, activation=f) for f in ("nvfp4", "mxfp4")}
    nvidia = Formats(weight="nvfp4_2d", activation="nvfp4", gradient="nvfp4")
    deepseek = Formats(weight="fp8_block", activation="fp8_row128", gradient="fp8_row128")
    return (
        Recipe(name="none", label="unquantized"),
        Recipe(name="w4a16", label=f"{format} weights", **experts(Formats(weight=format))),
        Recipe(
            name="w4a8",
            label=f"{format} weights, {wide} activations",
            **experts(Formats(weight=format, activation=wide)),
        ),
        Recipe(
            name="w4a4",
            label=f"{format} weights + activations",
            **experts(Formats(weight=format, activation=_rowwise(format))),
        ),
        # Fake quantization with straight-through gradients; _w: of the weights alone.
        Recipe(name="nvfp4_qat", label="NVFP4 QAT", **feed_forwards(fake["nvfp4"])),
        Recipe(name="mxfp4_qat", label="MXFP4 QAT", **feed_forwards(fake["mxfp4"])),
        Recipe(
            name="nvfp4_qat_w",
            label="NVFP4 QAT, weights",
            **feed_forwards(Formats(weight="nvfp4")),
        ),
        Recipe(
            name="mxfp4_qat_w",
            label="MXFP4 QAT, weights",
            **feed_forwards(Formats(weight="mxfp4")),
        ),
        # arXiv:2509.25149: 2D weights, 1x16 activations and gradients, transformed weight gradient, stochastic
        # gradients; attention, router, embedding and head stay. Its global scale of activations is per tensor; here it
        # is per token, so that training does not see the future either.
        Recipe(
            name="nvfp4_training",
            label="NVFP4 training",
            **feed_forwards(nvidia),
            hadamard=16,
            rounding="stochastic",
        ),
        # arXiv:2412.19437, section 3.3: every linear layer but router, embedding and head.
        Recipe(
            name="fp8_block",
            label="FP8 training, blocks",
            **feed_forwards(deepseek),
            attention=deepseek,
        ),
    )


def _rowwise(format: str) -> str:
    """The activations' format for a weight format: tiles of 16 rows would mix tokens."""
    return format.removesuffix("_2d")


_BY_NAME = {recipe.name: recipe for recipe in _table()}
NAMES = tuple(_BY_NAME)
FOUR_BIT = ("nvfp4", "nvfp4_2d", "nvfp4_46", "nvfp4_46_2d", "mxfp4", "int4_group")
NAMED = tuple(recipe.name for recipe in _named("nvfp4"))


def get(name: str) -> Recipe:
    """Returns the recipe that a table evaluates under that name.

    Raises:
      ValueError: there is none; the message has the closest name.
    """
    if name not in _BY_NAME:
        raise ValueError(f"unknown recipe {name!r}; {_guess(name, NAMES)}")
    return _BY_NAME[name]


def named(
    name: str,
    format: str = "nvfp4",
    roles: tuple[str, ...] = (),
    activation_scale: str = "per_token",
) -> Recipe:
    """Returns a recipe of training or of `moelab quantize`.

    >>> named("nvfp4_qat", roles=("attention.weight=nvfp4",)).attention.weight
    'nvfp4'

    Args:
      name: one of NAMED.
      format: of w4a16, w4a8 and w4a4, one of FOUR_BIT.
      roles: changes, each ROLE.PART=FORMAT with a role and part of ROLES; FORMAT none: not quantized.
      activation_scale: one of ACTIVATION_SCALES.

    Raises:
      ValueError: an unknown name, format, role or part; the message has what is allowed.
    """
    if name not in NAMED:
        raise ValueError(f"unknown recipe {name!r}; {_guess(name, NAMED)}")
    if format not in FOUR_BIT:
        raise ValueError(f"unknown 4-bit format {format!r}; choose from {', '.join(FOUR_BIT)}")
    if activation_scale not in ACTIVATION_SCALES:
        allowed = ", ".join(ACTIVATION_SCALES)
        raise ValueError(f"unknown activation_scale {activation_scale!r}; choose from {allowed}")
    recipe = next(recipe for recipe in _named(format) if recipe.name == name)
    recipe = dataclasses.replace(recipe, activation_scale=activation_scale)
    for change in roles:
        role, part, value = split_role(change)
        formats = dataclasses.replace(getattr(recipe, role), **{part: value})
        recipe = dataclasses.replace(recipe, **{role: formats})
    return recipe


def split_role(change: str) -> tuple[str, str, str | None]:
    """Splits ROLE.PART=FORMAT; formats are checked by whoever knows them.

    Raises:
      ValueError: not of that form, or no such role or part.
    """
    where, equals, value = change.partition("=")
    role, dot, part = where.partition(".")
    if not (equals and dot and value):
        raise ValueError(f"{change!r} is not of the form ROLE.PART=FORMAT")
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; {_guess(role, tuple(ROLES))}")
    if part not in ROLES[role]:
        raise ValueError(f"role {role} has no {part!r}; it has {', '.join(ROLES[role])}")
    return role, part, None if value == "none" else value


def _guess(name: str, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(allowed)}"
