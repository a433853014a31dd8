"""What others measured and published, each with its source: the evidence beside the planner's own numbers.

Serving figures here are used in no fit. Tokens are output tokens, except where the figure says otherwise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moelab.plan import measured
from moelab.plan.figures import Figure, Source
from moelab.plan.measured import Row


def _figure(value: float, unit: str, text: str, date: str, status: str = "measured") -> Figure:
    return Figure(value, unit, Source(text, date, status))


_DEEPEP = "DeepEP and NVLink two-sided exchange, kernel tables of aiconfigurator-core 0.12.0, 128 tokens a GPU"
_INFERENCEX = "InferenceX pages; tokens probably input and output"
_TRT = "TensorRT-LLM performance overview, commit 03e27c7d, maximum load"
EVIDENCE: dict[str, Figure] = {
    "exchange_nvl72_ep64": _figure(
        71e-6, "s per layer, dispatch and combine over 64 GPUs of GB200 NVL72", _DEEPEP, "2026-07"
    ),
    "exchange_ib_ep32": _figure(
        406e-6,
        "s per layer, dispatch and combine over 4 x 8 H100 by InfiniBand",
        _DEEPEP,
        "2026-07",
    ),
    "gb200_over_b200_at_125": _figure(
        4.39,
        "times tokens/s/GPU, GB200 NVL72 over B200, R1 1k/1k FP4 with MTP, 125 tokens/s/user",
        _INFERENCEX,
        "2026",
        "third party",
    ),
    "gb200_over_b200_at_164": _figure(
        1.09,
        "times tokens/s/GPU, GB200 NVL72 over B200, R1 8k/1k FP8, 164 tokens/s/user",
        _INFERENCEX,
        "2026",
        "third party",
    ),
    "v3_h800_node": _figure(
        14.8e3,
        "output tokens/s/node of 8 H800 over InfiniBand, EP144",
        "deepseek-ai/open-infra-index, day 6",
        "2025-03",
    ),
    "r1_b200_over_h200": _figure(
        3.97, "times tokens/s/GPU, R1, B200 in FP4 over H200 in FP8, 1k/1k", _TRT, "2025"
    ),
    "gpt_oss_b200_over_h200": _figure(
        3.78, "times tokens/s/GPU, gpt-oss-120b, B200 over H200, 1k/1k", _TRT, "2025"
    ),
    "qwen3_235b_b200_over_h200": _figure(
        1.75, "times tokens/s/GPU, Qwen3-235B, B200 in FP4 over H200 in FP8, 1k/1k", _TRT, "2025"
    ),
    "mlperf_software": _figure(
        2.77,
        "times tokens/s/GPU, R1 server on GB300, v6.0 over v5.1, six months of software",
        "MLPerf Inference v5.1 and v6.0",
        "2026-04",
    ),
    "claim_35x_low": _figure(
        0.12, "$ per million tokens, GB300 with MTP", _INFERENCEX, "2026", "third party"
    ),
    "claim_35x_high": _figure(
        4.20, "$ per million tokens, H200 at 90 tokens/s/GPU", _INFERENCEX, "2026", "third party"
    ),
    "gb300_without_mtp": _figure(
        2.35,
        "$ per million tokens at the same point without MTP",
        "blockbeats' summary of InferenceX v2, a secondary source",
        "2026",
        "third party",
    ),
    "mmlu_pro_moe": _figure(
        -0.5,
        "points of MMLU-Pro, MoE in NVFP4, worst of two",
        "ure.us, RTX PRO 6000",
        "2026",
        "third party",
    ),
    "mmlu_pro_dense": _figure(
        -2.4,
        "points of MMLU-Pro, dense in NVFP4, worst of two",
        "ure.us, RTX PRO 6000",
        "2026",
        "third party",
    ),
    "aime_nemotron": _figure(
        -2.4, "points of AIME25, Nemotron-3-Nano in NVFP4", "NVIDIA's model card", "2026", "vendor"
    ),
}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Measured pairs that differ in one thing.

    Attributes:
      what: which thing, from what to what.
      ratios: time per output token before over after, one per pair.
    """

    what: str
    ratios: np.ndarray

    @property
    def median(self) -> float:
        """Of the ratios."""
        return float(np.median(self.ratios))

    @property
    def quartiles(self) -> tuple[float, float]:
        """25 % and 75 %."""
        low, high = np.quantile(self.ratios, [0.25, 0.75])
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{self.what}: {self.median:.2f}x, quartiles {low:.2f} to {high:.2f}, {len(self.ratios)} pairs"


def _configuration(row: Row) -> tuple:
    return (row.raw["model_path"], row.engine, row.tp, row.dp, row.ep, row.batch, row.isl, row.osl)


def pairs(rows: Sequence[Row], name: str, before: str, after: str) -> Pairs:
    """Pairs rows that are equal but for the GPU or the precision.

    Where a configuration was measured repeatedly, its median counts.

    Args:
      name: "gpu" or "precision" (of the table: fp8, fp4).
    """
    other = "precision" if name == "gpu" else "gpu"
    value = lambda row, n: row.gpu if n == "gpu" else row.raw["precision"]  # noqa: E731
    times: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        key = (*_configuration(row), value(row, other))
        times.setdefault(key, {}).setdefault(value(row, name), []).append(row.tpot)
    found = [
        float(np.median(group[before]) / np.median(group[after]))
        for group in times.values()
        if before in group and after in group
    ]
    return Pairs(f"{before} to {after} at equal configuration", np.array(found))


def measured_pairs() -> dict[str, Pairs]:
    """Returns the pairs of the wheel's rows; nothing where it is not installed."""
    if measured.folder() is None:
        return {}
    rows, _ = measured.rows()
    return {
        "fp8 to fp4": pairs(rows, "precision", "fp8", "fp4"),
        "h200 to b200": pairs(rows, "gpu", "h200", "b200"),
        "h100 to h200": pairs(rows, "gpu", "h100", "h200"),
        "b200 to b300": pairs(rows, "gpu", "b200", "b300"),
    }


@dataclasses.dataclass(frozen=True)
class Gap:
    """What a format cost in quality in moelab's own study.

    Attributes:
      precision, label: of the study.
      bits: bits per byte more than float32, and its 95 % interval.
      agreement: share of the tokens that keep their set of experts; None where it was not measured.
      reference: bits per byte in float32.
    """

    precision: str
    label: str
    bits: tuple[float, float, float]
    agreement: float | None
    reference: float


QUALITY = ("fp8_wa", "nvfp4_w", "nvfp4_wa", "mxfp4_w", "mxfp4_wa", "nvfp4_kv")


def quality(path: Path | None = None) -> tuple[Gap, ...]:
    """Reads the published study of moelab's own MoE; nothing where the experiments are not beside the package."""
    if path is None:
        from moelab import config_file

        places = (folder / "baselines" / "quant.json" for folder in config_file.folders())
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            return ()
    study = json.loads(path.read_text(encoding="utf-8"))["moe"]
    rows = {row["precision"]: row for row in study["formats"]}
    reference = float(np.mean(study["float32"]))
    return tuple(
        Gap(
            name,
            rows[name]["label"],
            tuple(rows[name]["difference"][k] for k in ("estimate", "low", "high")),
            rows[name].get("router_agreement"),
            reference,
        )
        for name in QUALITY
        if name in rows
    )
