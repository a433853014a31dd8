"""Descriptions of GPUs that are not here: those that XLA's CUDA plugin carries, read from it at run time.

XLA compiles for a GPU that it knows from a `GpuTargetConfigProto` in text form. Its CUDA plugin embeds one for every
GPU that XLA's own tests use; they are found there by their first and last fields. None is kept in this repository.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pallas_kernels.device import Device

# Short names of those that kernels are verified for; the rest are called by their makers' names in lower case.
SHORT_NAMES = {
    "b200": "NVIDIA B200",
    "gb200": "NVIDIA GB200",
    "b300": "NVIDIA B300",
    "gb300": "NVIDIA GB300",
    "vr200": "NVIDIA VR NVL72",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200 141GB HBM3e",
    "a100": "NVIDIA A100-SXM4-80GB",
    "rtx_pro_6000": "NVIDIA RTX PRO 6000 Blackwell",
    "a6000": "NVIDIA RTX A6000",
}
# Numbers of XLA's PrimitiveType, for the rates of the tensor cores.
_DTYPES = {
    10: "float16",
    11: "float32",
    16: "bfloat16",
    19: "float8_e5m2",
    20: "float8_e4m3fn",
    32: "float4_e2m1fn",
}
_DESCRIPTION = re.compile(
    rb"gpu_device_info \{\n[^\0]*?\ndevice_description_str: \"([^\"]*)\"[^\0#]*"
)
_WORD = re.compile(r'#[^\n]*|"(?:[^"\\]|\\.)*"|[{}:]|[^\s{}:"#]+')


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
      name: short name, such as "b200".
      maker_name: "NVIDIA B200".
      capability: CUDA compute capability, (10, 0).
      num_sms: streaming multiprocessors.
      memory_bytes, memory_bandwidth: of device memory; bytes, and bytes per second.
      l2_bytes: second-level cache.
      clock_hz: highest clock of the multiprocessors.
      shared_bytes: most shared memory that one block can ask for.
      registers: 32-bit registers of one multiprocessor.
      matrix_flops: dtype -> multiplications and additions per second of all tensor cores, dense, by the units and the
        clock of the description; empty where it gives none. No kernel reaches it, and a few descriptions are wrong
        (B300's FP4 is sold as 15e15).
      text: the description itself, for XLA.
    """

    name: str
    maker_name: str
    capability: tuple[int, int]
    num_sms: int
    memory_bytes: int
    memory_bandwidth: float
    l2_bytes: int
    clock_hz: float
    shared_bytes: int
    registers: int
    matrix_flops: Mapping[str, float]
    text: str = dataclasses.field(repr=False)

    @property
    def arch(self) -> str:
        """The name that ptxas has for its machine code, with what only this architecture has: "sm_100a"."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def tmem_columns(self) -> int:
        """Columns of tensor memory of one multiprocessor; 0 where there is none."""
        return 512 if self.device.is_tcgen05 else 0

    @property
    def device(self) -> Device:
        """The device that kernels are chosen for while compiling."""
        return Device("gpu", self.maker_name, self.capability, self.num_sms)


def plugin() -> Path | None:
    """Returns XLA's CUDA plugin, or None where it is not installed. Imports nothing of it."""
    for package in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in spec.submodule_search_locations if spec else ():
            library = Path(folder) / "xla_cuda_plugin.so"
            if library.exists():
                return library
    return None


@functools.cache
def targets() -> dict[str, Target]:
    """Returns every NVIDIA GPU that the installed plugin describes, by short name; those of SHORT_NAMES first.

    Raises:
      RuntimeError: the plugin is not installed (extra aot).
    """
    library = plugin()
    if library is None:
        raise RuntimeError("jax-cuda13-plugin is not installed: pip install 'moelab[aot]'")
    found = {}
    for text in embedded(library):
        fields = parse(text)
        if fields.get("platform_name") == "CUDA":
            target = from_fields(fields, text)
            found[target.name] = target
    order = [*filter(found.get, SHORT_NAMES), *sorted(found.keys() - SHORT_NAMES.keys())]
    return {name: found[name] for name in order}


def embedded(library: Path) -> Iterator[str]:
    """Finds the descriptions in a shared object."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in _DESCRIPTION.finditer(data):
            yield match.group().decode().strip() + "\n"


def parse(text: str) -> dict[str, object]:
    """Reads the text form of a protocol buffer.

    Returns:
      Field -> number, word or string, nested fields, or a list of these where the field is repeated.

    Raises:
      ValueError: braces do not match, or a field has no value.

    >>> parse('a: 1 b { c: "x" } b { c: "y" } # note')
    {'a': 1, 'b': [{'c': 'x'}, {'c': 'y'}]}
    """
    words = [word for word in _WORD.findall(text) if word != ":" and not word.startswith("#")]
    words = iter(["{", *words, "}"])
    fields = _message(words)
    if next(words, None) is not None:
        raise ValueError("text after the end of the message")
    return fields


def _message(words: Iterator[str]) -> dict[str, object]:
    """Reads `{ field value ... }`."""
    if next(words, "") != "{":
        raise ValueError("a message begins with {")
    fields: dict[str, object] = {}
    for name in words:
        if name == "}":
            return fields
        value = _value(words)
        if name not in fields:
            fields[name] = value
        elif isinstance(fields[name], list):
            fields[name].append(value)
        else:
            fields[name] = [fields[name], value]
    raise ValueError("a message ends with }")


def _value(words: Iterator[str]) -> object:
    word = next(words, "")
    if word == "{":
        return _message(itertools.chain([word], words))
    if not word or word == "}":
        raise ValueError("a field has no value")
    if word.startswith('"'):
        return word[1:-1]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word


def from_fields(fields: Mapping[str, object], text: str) -> Target:
    """Makes a target of a parsed description."""
    info = fields["gpu_device_info"]
    maker_name = fields["device_description_str"]
    capability = info["cuda_compute_capability"]
    short = {value: key for key, value in SHORT_NAMES.items()}
    lower = re.sub(r"[^a-z0-9]+", "_", maker_name.lower()).strip("_")
    return Target(
        name=short.get(maker_name, lower.removeprefix("nvidia_")),
        maker_name=maker_name,
        capability=(capability["major"], capability.get("minor", 0)),
        num_sms=info["core_count"],
        memory_bytes=info["device_memory_size"],
        memory_bandwidth=float(info["memory_bandwidth"]),
        l2_bytes=info["l2_cache_size"],
        clock_hz=info["clock_rate_ghz"] * 1e9,
        shared_bytes=info["shared_memory_per_block_optin"],
        registers=info["registers_per_core_limit"],
        matrix_flops=_matrix_flops(info),
        text=text,
    )


def _matrix_flops(info: Mapping[str, object]) -> dict[str, float]:
    """Multiplies out units, clock and multiply-adds per clock; a multiply-add is two operations."""
    rates = info.get("matrix_unit_description", {}).get("rate_infos", [])
    found = {}
    for rate in rates if isinstance(rates, list) else [rates]:
        if rate["key"] in _DTYPES:
            unit = rate["value"]
            per_clock = unit["units_per_core"] * unit["ops_per_clock"] * 2
            hertz = unit["clock_rate_ghz"] * 1e9
            found[_DTYPES[rate["key"]]] = float(per_clock * hertz * info["core_count"])
    return found
