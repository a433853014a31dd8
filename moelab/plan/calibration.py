"""The calibrated values that predictions use: shipped as `calibrated.json`, made by `moelab plan validate --write`.

Nothing is fitted here: no wheel and no scipy are needed to predict.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

from moelab.errors import UserError
from moelab.plan.roofline import Efficiency

FILE = Path(__file__).parent / "calibrated.json"
FORMAT = "moelab.plan.calibration"
_UNITS = {"software": " years after 2026-01-01"}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was fitted to what.

    Attributes:
      values: parameter -> value.
      intervals: parameter -> 80 % interval over resampled sweeps.
      draws: parameter -> other values that could be, one per draw of sweeps and priors, to carry uncertainty on.
      skew: exponent of the experts' loads.
      band: 10 % and 90 % quantiles of log(measured / predicted) on sweeps that were left out.
      ranges: what the fitted rows span: number -> (least, most), or names; software in years after 2026-01-01.
      source, date: of the rows.
      rows, sweeps: how many.
    """

    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    draws: Mapping[str, tuple[float, ...]]
    skew: float
    band: tuple[float, float]
    ranges: Mapping[str, tuple]
    source: str
    date: str
    rows: int
    sweeps: int

    @property
    def efficiency(self) -> Efficiency:
        """For the roofline."""
        return _efficiency(self.values)

    def drawn(self) -> tuple[Efficiency, ...]:
        """Returns the efficiencies of every draw."""
        count = len(next(iter(self.draws.values())))
        return tuple(_efficiency({n: d[i] for n, d in self.draws.items()}) for i in range(count))

    def outside(self, **asked) -> tuple[str, ...]:
        """Names what was asked for beyond the range of the fitted rows.

        >>> shipped().outside(batch=1e6)[0].startswith("batch 1000000 is above")
        True
        """
        found = []
        for name, value in asked.items():
            span = self.ranges[name]
            if isinstance(value, str):
                if value not in span:
                    found.append(f"{name} {value}")
            elif value < span[0] * (1 - 1e-9):
                found.append(f"{name} {value:.6g}{_UNITS.get(name, '')} is below {span[0]:.6g}")
            elif value > span[1] * (1 + 1e-9):
                found.append(f"{name} {value:.7g}{_UNITS.get(name, '')} is above {span[1]:.6g}")
        return tuple(found)

    def bounds(self, outside: bool) -> tuple[float, float]:
        """Returns the factors of the 80 % band; beyond the calibrated range at least 1/2 and 2 (an assumption)."""
        low, high = self.band
        if outside:
            low, high = min(low, -math.log(2)), max(high, math.log(2))
        return math.exp(low), math.exp(high)


def _efficiency(v: Mapping[str, float]) -> Efficiency:
    return Efficiency(
        compute=tuple(v[f"compute.{p}"] for p in ("bf16", "fp8", "fp4")),
        memory=tuple(v[f"memory.{c}"] for c in ("bf16", "fp8", "fp4", "keys")),
        link=(v["link.nvlink"], v["link.nic"]),
        layer=tuple(v[f"layer.{e}"] for e in ("trtllm", "sglang", "vllm")),
        collective=v["collective"],
        step=v["step"],
        mixing=v["mixing"],
        drift=v["drift"],
    )


@functools.cache
def shipped() -> Calibration:
    """Returns the calibration that comes with the package."""
    return load(FILE)


def load(path: Path | str) -> Calibration:
    """Reads a calibration.

    Raises:
      UserError: no such file, or not one of these.
    """
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        if read.pop("format") != FORMAT:
            raise KeyError("format")
        for name in ("intervals", "draws", "ranges"):
            read[name] = {k: tuple(v) for k, v in read[name].items()}
        return Calibration(**read | {"band": tuple(read["band"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no calibration of moelab: {error}") from None


def save(path: Path | str, value: Calibration) -> None:
    """Writes a calibration."""
    text = json.dumps({"format": FORMAT} | dataclasses.asdict(value), indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")
