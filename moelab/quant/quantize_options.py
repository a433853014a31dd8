"""What `moelab quantize` is asked to make of a run, and whether the run allows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelab import model as model_lib
from moelab.errors import ConfigError
from moelab.quant import export, ptq, storage
from pallas_kernels import formats

SCHEMES = ("w4a16", "w4a8", "w4a4")
ACTIVATION_SCALES = ("per_token", "static")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to make of a run.

    Attributes:
      out: folder for the packed run; new or empty.
      schemes: of SCHEMES; each is a row of the report. The first is what is exported.
      format: of the experts' weights, one of recipes.FOUR_BIT.
      rule: scale rule of the weights; None is the format's own.
      method: of ptq.KINDS.
      method_fields: fields of the method that differ from their defaults.
      activation_scale: of NVFP4 activations under w4a4: per_token, or static, calibrated per expert, as engines do.
      step: a checkpoint's step, or latest.
      split: which documents the report is about.
      rest_dtype: of what is not packed, as stored and as evaluated.
      layout: of the export, or "".
      calibration_tokens: of the training split, shared out evenly over its domains.
      min_tokens: an expert that saw fewer takes its statistics from the fallback.
      fallback: siblings or all_tokens.
      gate_weighted: weight rows by the router's weights in the Hessians.
    """

    out: str | Path
    schemes: tuple[str, ...] = ("w4a16",)
    format: str = "nvfp4"
    rule: str | None = None
    method: str = "rtn"
    method_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    activation_scale: str = "per_token"
    step: str | int = "latest"
    split: str = "test"
    rest_dtype: str = "float32"
    layout: str = ""
    calibration_tokens: int = 65536
    min_tokens: int = 64
    fallback: str = "siblings"
    gate_weighted: bool = False

    @property
    def scale(self) -> str:
        """The scales under which w4a4 is evaluated: those of the export, where it carries its own."""
        exported = bool(self.layout) and export.LAYOUTS[self.layout].static_input_scale
        return "static" if exported and self.schemes[0] == "w4a4" else self.activation_scale

    @property
    def static(self) -> bool:
        """Whether something needs the calibrated maxima of the activations."""
        return "w4a4" in self.schemes and self.scale == "static"


def check(config, options: Options):
    """Returns the method, or raises ConfigError where the options do not fit the run."""
    storage.check_empty(options.out)
    if not model_lib.moe_layers(config):
        raise ConfigError(
            "the run has no experts (moe.num_experts=0): there is nothing to quantize"
        )
    if config.moe.slots_per_expert:
        raise ConfigError("the run is Soft MoE (moe.slots_per_expert), which has no routed experts")
    if config.moe.activation != "swiglu":
        raise ConfigError(
            f"the run has moe.activation={config.moe.activation}: what is measured and exported here assumes swiglu"
        )
    if options.layout:
        export.check_model(config, options.layout, options.format)
        if options.schemes[0] == "w4a8":
            raise ConfigError(f"{options.layout} has no w4a8; export w4a16 or w4a4")
    if len(set(options.schemes)) < len(options.schemes):
        raise ConfigError(f"each recipe is named once, got {', '.join(options.schemes)}")
    if options.activation_scale == "static" and formats.FORMATS[options.format].scale != "e4m3":
        raise ConfigError(f"activation_scale=static is for the NVFP4 formats, not {options.format}")
    if options.activation_scale == "static" and "w4a4" not in options.schemes:
        raise ConfigError("activation_scale=static is for w4a4, which is not among the recipes")
    try:
        method = ptq.make(options.method, **options.method_fields)
    except ValueError as error:
        raise ConfigError(f"method {options.method}: {error}") from None
    if options.format not in method.allowed:
        allowed = ", ".join(method.allowed)
        raise ConfigError(
            f"method {options.method} cannot make {options.format}; allowed: {allowed}"
        )
    _check_widths(config, options.format, getattr(method, "rotation", None))
    return method


def _check_widths(config, format: str, rotation: int | None) -> None:
    spec = formats.FORMATS[format]
    tiles = spec.block_rows > 1
    for field, width in (
        ("model.width", config.model.width),
        ("moe.expert_width", config.moe.expert_width),
    ):
        if rotation and width % rotation:
            raise ConfigError(f"rotation={rotation} does not divide {field}={width}")
        if width % spec.block:
            raise ConfigError(
                f"{format} has {'tiles' if tiles else 'blocks'} of {spec.block}, which do not divide {field}={width}"
            )
