"""GPUs and systems of them: `find("b200")`, `system("gb200x72")`, or a GPU of your own from a JSON file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

from moelab import spelling
from moelab.errors import UserError
from moelab.plan import gpus
from moelab.plan.figures import Figure, Source

FIELDS = {
    "memory": "B",
    "bandwidth": "B/s",
    "nvlink": "B/s",
    "domain": "GPUs",
    "nic": "B/s",
    "power": "W",
}
PEAKS = ("bf16", "fp8", "fp4")


class HardwareError(UserError):
    """A GPU or a number of them that there is not; the message names the nearest."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU and its links.

    Attributes:
      name: "b200".
      maker_name: "B200 HGX".
      capability: CUDA compute capability.
      peaks: "bf16", "fp8", "fp4" -> dense FLOP/s; what is missing the tensor cores do not have.
      memory: bytes that a program can use.
      bandwidth: of the memory, B/s.
      nvlink: B/s in one direction to the GPUs of the scale-up domain (PCIe where there is no NVLink).
      domain: GPUs in one scale-up domain.
      nic: B/s in one direction to all others.
      power: W, as sold (not what is measured at the wall).
    """

    name: str
    maker_name: str
    capability: tuple[int, int]
    peaks: Mapping[str, Figure]
    memory: Figure
    bandwidth: Figure
    nvlink: Figure
    domain: Figure
    nic: Figure
    power: Figure

    def figures(self) -> dict[str, Figure]:
        """Returns every figure by name."""
        return {f"peak_{k}": v for k, v in self.peaks.items()} | {
            name: getattr(self, name) for name in FIELDS
        }

    def unverified(self) -> tuple[str, ...]:
        """Names the figures that were not checked against a source."""
        return tuple(name for name, figure in self.figures().items() if figure.unverified)

    def peak(self, precision: str) -> float:
        """Returns dense FLOP/s in a precision.

        Raises:
          HardwareError: the tensor cores have no such precision.
        """
        if precision not in self.peaks:
            able = [name for name, gpu in GPUS.items() if precision in gpu.peaks]
            raise HardwareError(
                f"{self.name} has no {precision} tensor cores; it computes in {', '.join(self.peaks)}, with experts "
                f"stored in 4 bits as nvfp4_w4a16, mxfp4_w4a16 or int4; {precision} runs on {', '.join(able)}"
            )
        return self.peaks[precision].value


GPUS = {
    name: Gpu(name, maker, capability, peaks, **fields)
    for name, (maker, capability, peaks, fields) in gpus.TABLE.items()
}
_ALIASES = {"gb200_nvl72": "gb200", "gb300_nvl72": "gb300", "rtxpro6000": "rtx_pro_6000"}


@dataclasses.dataclass(frozen=True)
class System:
    """A number of equal GPUs."""

    gpu: Gpu
    count: int

    @property
    def name(self) -> str:
        """As on the command line: "b200x8"."""
        return f"{self.gpu.name}x{self.count}"


def find(name: str) -> Gpu:
    """Returns a GPU by its name, or reads one from a JSON file.

    Raises:
      HardwareError: there is none; the message names the nearest.
    """
    if name.endswith(".json"):
        return from_json(name)
    key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    key = _ALIASES.get(key, key).removesuffix("_sxm").removesuffix("_hgx")
    if key not in GPUS:
        hint = spelling.hint(key, GPUS) or f"; there are {', '.join(GPUS)}, or FILE.json"
        raise HardwareError(f"no GPU {name!r}{hint}")
    return GPUS[key]


def system(text: str) -> System:
    """Reads "b200x8"; without a number, one scale-up domain.

    >>> system("gb200").count, system("h200x16").name
    (72, 'h200x16')

    Raises:
      HardwareError: no such GPU, or not so many.
    """
    match = re.fullmatch(r"(.+?)x(-?\d+)", text.strip())
    gpu = find(match[1] if match else text.strip())
    count = int(match[2]) if match else int(gpu.domain.value)
    if not 1 <= count <= 65536:
        raise HardwareError(f"{text!r} wants 1 to 65536 GPUs, got {count}")
    return System(gpu, count)


def from_json(path: str) -> Gpu:
    """Reads a GPU of your own.

    The file is {"name": ..., "source": ..., "date": "YYYY-MM-DD", "peaks": {"bf16": FLOP/s, ...}, "memory": bytes,
    "bandwidth": B/s, "nvlink": B/s, "domain": GPUs, "nic": B/s, "power": W}, peaks dense, links per direction.

    Raises:
      HardwareError: no such file, a field too few or too many, or a number that is none.
    """
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HardwareError(f"{path} is no JSON file of a GPU: {error}") from None
    wanted = {"name", "source", "date", "peaks", *FIELDS}
    if not isinstance(read, dict) or set(read) != wanted:
        got = sorted(read) if isinstance(read, dict) else type(read).__name__
        raise HardwareError(f"{path} wants exactly the fields {sorted(wanted)}, got {got}")
    try:
        source = Source(str(read["source"]), str(read["date"]), "assumed")
        peaks = {k: Figure(_positive(v), "FLOP/s", source) for k, v in read["peaks"].items()}
        figures = {k: Figure(_positive(read[k]), unit, source) for k, unit in FIELDS.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise HardwareError(f"{path}: {error}") from None
    if "bf16" not in peaks or set(peaks) - set(PEAKS):
        raise HardwareError(f"{path}: peaks wants bf16 and may have fp8, fp4; got {sorted(peaks)}")
    if read["name"] in GPUS:
        raise HardwareError(f"{path}: the name {read['name']} is taken by a GPU known here")
    if figures["domain"].value % 1:
        raise HardwareError(f"{path}: domain wants a whole number of GPUs, got {read['domain']}")
    return Gpu(str(read["name"]), str(read["name"]), (0, 0), peaks, **figures)


def _positive(value: object) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"wants a number above 0, got {value!r}")
    return number
