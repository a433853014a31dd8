"""The measured serving rows of the optional wheel `aiconfigurator-core`, and the rules by which some are left out.

The wheel (extra `plan-data`) is read as data where it is installed; nothing of it is imported or copied.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import datetime
import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from moelab.errors import UserError
from moelab.plan import readers, recipes
from moelab.plan.models import Model

PACKAGE = "aiconfigurator_core"
VERSION = "0.12.0"
FILE = "systems/silicon_sample.csv"
MOST_GPUS = 8  # of an aggregated replica: beyond it the count is that of a whole deployment
SYSTEMS = {"h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200", "b300_sxm": "b300"}
SYSTEMS |= {"gb200": "gb200", "gb300": "gb300", "a100_sxm": "a100"}
HOPPER = ("h100", "h200")
_CONFIGS = {  # the name in the table -> the config file of the wheel
    "deepseek-ai/DeepSeek-R1": "deepseek-ai--DeepSeek-R1",
    "deepseek-ai/DeepSeek-V3": "deepseek-ai--DeepSeek-V3",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-ai--DeepSeek-R1",
    "nvidia/DeepSeek-V3.1-NVFP4": "nvidia--DeepSeek-V3.1-NVFP4",
    "MiniMaxAI/MiniMax-M2.5": "MiniMaxAI--MiniMax-M2.5",
    "openai/gpt-oss-120b": "openai--gpt-oss-120b",
    "Qwen/Qwen3-235B-A22B-FP8": "Qwen--Qwen3-235B-A22B-FP8",
    "Qwen/Qwen3.5-397B-A17B": "Qwen--Qwen3.5-397B-A17B",
    "moonshotai/Kimi-K2.5": "moonshotai--Kimi-K2.5",
    "zhipuai/GLM-5": "zai-org--GLM-5",
}
FAMILIES = ("DeepSeek", "gpt-oss", "MiniMax", "Kimi", "Qwen3.5", "Qwen3-235B", "GLM")


@dataclasses.dataclass(frozen=True)
class Row:
    """One serving measurement.

    Attributes:
      model, gpu, engine, precision: as in the planner; precision is a recipe's name.
      tp, dp, ep: the layout of one replica.
      batch: concurrent sequences of one attention copy.
      isl, osl: prompt and answer, tokens.
      ttft, tpot: measured, seconds.
      years: of the measurement after 2026-01-01.
      raw: the row as it is in the file.
    """

    model: str
    gpu: str
    engine: str
    precision: str
    tp: int
    dp: int
    ep: int
    batch: int
    isl: int
    osl: int
    ttft: float
    tpot: float
    years: float
    raw: Mapping[str, str] = dataclasses.field(repr=False)

    @property
    def family(self) -> str:
        """Models that belong together when some are held out."""
        return next(f for f in FAMILIES if f.lower() in self.model.lower())


def folder() -> Path | None:
    """Returns the wheel's folder, or None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def need() -> Path:
    """Returns the wheel's folder.

    Raises:
      UserError: it is not installed; the message says how to.
    """
    found = folder()
    if found is None or not (found / FILE).is_file():
        raise UserError(
            f"this needs the measurements of aiconfigurator-core {VERSION}: pip install 'moelab[plan-data]'"
        )
    return found


@functools.cache
def model(name: str) -> Model:
    """Returns the shape of a model of the table, from the config that the wheel ships."""
    path = need() / "model_configs" / f"{_CONFIGS[name]}_config.json"
    return dataclasses.replace(readers.model(str(path)), name=name)


def read() -> list[dict[str, str]]:
    """Reads the table as it is."""
    with (need() / FILE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _int(row: Mapping, name: str) -> int:
    return int(float(row[name])) if row[name] else 0


def concurrency(row: Mapping) -> int:
    """Returns the concurrency that the source names; 0: none."""
    found = re.search(r"silicon_concurrency=(\d+)", row["silicon_data_source"])
    return int(found[1]) if found else 0


def _sizes(row: Mapping) -> tuple[int, int, int, int]:
    return tuple(_int(row, f"{n}_size") for n in ("tp", "attention_dp", "moe_tp", "moe_ep"))


def _dp(row: Mapping) -> int:
    """Attention copies; where none are given, one if the other sizes agree with it."""
    tp, dp, moe_tp, ep = _sizes(row)
    return dp or (1 if tp == moe_tp * ep else 0)


def _too_heavy(row: Mapping) -> bool:
    from moelab.plan import hardware

    gpus = _int(row, "tp_size") * _dp(row)
    weights = model(row["model_path"]).weight_bytes(recipes.named(precision(row)))
    return weights > gpus * hardware.find(SYSTEMS[row["system"]]).memory.value


# In this order; a row counts where it fails first.
RULES: tuple[tuple[str, Callable[[Mapping], bool]], ...] = (
    ("disaggregated: prefill and decoding on different GPUs", lambda r: r["mode"] != "agg"),
    ("a dense model", lambda r: r["model_path"] not in _CONFIGS),
    ("no time per output token", lambda r: not float(r["silicon_tpot_ms"] or 0) > 0),
    ("no precision", lambda r: not r["precision"]),
    ("sizes missing, so that the number of GPUs is a guess", lambda r: not _dp(r)),
    (
        "impossible: tp x attention dp is not moe tp x ep",
        lambda r: _sizes(r)[0] * _dp(r) != _sizes(r)[2] * _sizes(r)[3],
    ),
    (
        f"ambiguous: more than {MOST_GPUS} GPUs in one aggregated replica (a deployment's total, or tp x ep)",
        lambda r: _sizes(r)[0] * _dp(r) > MOST_GPUS,
    ),
    (
        "ambiguous: attention tp equals attention dp, so the number of GPUs is tp or its square",
        lambda r: _sizes(r)[0] == _dp(r) > 1,
    ),
    (
        "ambiguous: attention dp equals moe tp x ep with both above 1, so the number is dp or its root",
        lambda r: _dp(r) > 1 and _sizes(r)[2] > 1 and _sizes(r)[3] > 1,
    ),
    (
        "the batch is not the concurrency over attention dp",
        lambda r: concurrency(r) != _int(r, "batch_size") * _dp(r),
    ),
    ("impossible: the weights exceed the GPUs' memory", _too_heavy),
)
REPEATED = "a measurement that is there twice"


def precision(row: Mapping) -> str:
    """Returns the recipe that a row's engine computes in.

    gpt-oss ships MXFP4: weight-only on Hopper, against FP8 activations on Blackwell. NVFP4 checkpoints quantize the
    experts. Keys and values are taken as FP8 for FP8 and FP4 checkpoints of latent attention, else as bfloat16.
    """
    name = {"fp4": "nvfp4", "fp8": "fp8", "bf16": "bf16", "int4": "int4"}[row["precision"]]
    hopper = SYSTEMS[row["system"]] in HOPPER
    if "gpt-oss" in row["model_path"]:
        return "mxfp4_w4a16" if hopper else "mxfp4_w4a8"
    if name == "nvfp4" and hopper:
        return "nvfp4_w4a16"
    latent = any(f in row["model_path"] for f in ("DeepSeek", "Kimi", "GLM"))
    return f"{name}+kv8" if latent and name in ("nvfp4", "fp8") else name


def years(row: Mapping) -> float:
    """Returns years between 2026-01-01 and the measurement; without a date, that of the sources named 2025 or 0."""
    found = re.search(r"measured=(\d{4}-\d{2}-\d{2})", row["silicon_data_source"])
    if not found:
        return 0.0
    day = datetime.date.fromisoformat(found[1])
    return (day - datetime.date(2026, 1, 1)).days / 365.25


def _row(raw: Mapping) -> Row:
    return Row(
        model=raw["model_path"],
        gpu=SYSTEMS[raw["system"]],
        engine=raw["backend"],
        precision=precision(raw),
        tp=_int(raw, "tp_size"),
        dp=_dp(raw),
        ep=_int(raw, "moe_ep_size"),
        batch=_int(raw, "batch_size"),
        isl=_int(raw, "isl"),
        osl=_int(raw, "osl"),
        ttft=float(raw["silicon_ttft_ms"] or 0) / 1e3,
        tpot=float(raw["silicon_tpot_ms"]) / 1e3,
        years=years(raw),
        raw=raw,
    )


def rows() -> tuple[list[Row], dict[str, int]]:
    """Reads the rows that can be used, and counts those left out by rule."""
    kept, left, seen = [], collections.Counter(), set()
    for raw in read():
        rule = next((name for name, fails in RULES if fails(raw)), None)
        if rule is None:
            row = _row(raw)
            key = (row.model, row.gpu, row.engine, row.precision, row.tp, row.dp, row.ep)
            key += (row.batch, row.isl, row.osl, round(row.tpot, 7))
            rule = REPEATED if key in seen else None
            seen.add(key)
        if rule is None:
            kept.append(row)
        else:
            left[rule] += 1
    order = [name for name, _ in RULES] + [REPEATED]
    return kept, {name: left[name] for name in order if left[name]}
