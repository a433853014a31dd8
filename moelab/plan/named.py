"""Published serving rates, each a case by name: what the planner says about measurements that are in no fit.

They are others' best efforts at one point, of other software dates, with details that the sources leave out. So the
ratio of predicted to measured is printed, and no bar is set.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from moelab.plan import hardware, published, recipes, search
from moelab.plan.figures import Source
from moelab.plan.serving import Load
from moelab.plan.work import Layout


@dataclasses.dataclass(frozen=True)
class Case:
    """One published rate.

    Attributes:
      name, model, system, precision: what was measured on what.
      layout: of one replica; degrees that the source leaves open are the usual ones.
      load: prompt, answer, serving mode.
      batch: sequences per attention copy; 0: as many as give the most, at maximum load.
      rate: output tokens/s/GPU, of the decoding GPUs where prompts are read elsewhere.
      years: of the software after 2026-01-01.
      source: of the rate.
    """

    name: str
    model: str
    system: str
    precision: str
    layout: Layout
    load: Load
    batch: int
    rate: float
    years: float
    source: Source


_TRT = Source(
    "TensorRT-LLM performance overview, commit 03e27c7d, maximum load", "2025", "measured"
)
_DAY6 = Source("deepseek-ai/open-infra-index, day 6", "2025-03", "measured")
_PROFILE = Source("deepseek-ai/profile-data, by InferSim's README", "2025-03", "measured")
_LMSYS_H100 = Source("lmsys.org, 96 H100 with DeepEP", "2025-05-05", "measured")
_LMSYS_GB200 = Source("lmsys.org, GB200 NVL72, part 2 (saturated decode)", "2025-09-25", "measured")
_VLLM = Source("vLLM blog, wide expert parallelism on H200", "2025-12", "measured")


def _trt(model, gpu, precision, gpus, isl, osl, rate, dp=True) -> Case:
    layout = Layout(1, gpus, gpus) if dp else Layout(1)
    name = f"{model} {gpu} {precision} {'DEP' if dp else 'TP'}{gpus} {isl}/{osl}"
    load = Load(isl, osl)
    return Case(name, model, f"{gpu}x{gpus}", precision, layout, load, 0, rate, -0.1, _TRT)


def _decode(name, system, precision, layout, load, batch, rate, years, source) -> Case:
    apart = dataclasses.replace(load, disaggregated=True)
    return Case(name, "deepseek_v3", system, precision, layout, apart, batch, rate, years, source)


CASES = (
    _trt("deepseek_v3", "b200", "nvfp4+kv8", 4, 1024, 1024, 6463),
    _trt("deepseek_v3", "gb200", "nvfp4+kv8", 4, 1024, 1024, 6939),
    _trt("deepseek_v3", "h200", "fp8+kv8", 8, 1024, 1024, 1627),
    _trt("deepseek_v3", "b200", "nvfp4+kv8", 4, 1024, 8192, 3862),
    _trt("deepseek_v3", "h200", "fp8+kv8", 8, 1024, 8192, 1218),
    _trt("deepseek_v3", "b200", "nvfp4+kv8", 4, 8192, 1024, 1168),
    _trt("gpt_oss_120b", "b200", "mxfp4_w4a8+kv8", 2, 1024, 1024, 25943),
    _trt("gpt_oss_120b", "h200", "mxfp4_w4a16+kv8", 1, 1024, 1024, 6868, dp=False),
    _trt("gpt_oss_120b", "h100", "mxfp4_w4a16+kv8", 4, 1024, 1024, 4685),
    _trt("gpt_oss_120b", "b200", "mxfp4_w4a8+kv8", 2, 8192, 1024, 6111),
    _trt("qwen3_235b", "b200", "nvfp4+kv8", 4, 1024, 1024, 5764),
    _trt("qwen3_235b", "h200", "fp8+kv8", 4, 1024, 1024, 3288),
    _trt("qwen3_235b", "h100", "fp8+kv8", 8, 1024, 1024, 1932),
    _trt("qwen3_235b", "b200", "nvfp4+kv8", 4, 8192, 1024, 1410),
    _trt("qwen3_30b", "b200", "nvfp4+kv8", 1, 1024, 1024, 26971, dp=False),
    _decode(
        "DeepSeek production, EP144 on H800",
        "h800x144",
        "fp8",
        Layout(1, 144, 144),
        Load(4989, 1, overlap="two_batch"),  # average length of keys 4,989
        85,  # 14.8k tokens/s/node of 8 at 20 to 22 tokens/s/user
        14800 / 8,
        -0.83,
        _DAY6,
    ),
    _decode(
        "DeepSeek profile, EP128 on H800, 128 requests a GPU",
        "h800x128",
        "fp8",
        Layout(1, 128, 128),
        Load(4096, 1, overlap="two_batch"),
        128,
        2324,
        -0.83,
        _PROFILE,
    ),
    _decode(
        "SGLang, EP72 on H100",
        "h100x72",
        "fp8",
        Layout(1, 72, 72),
        Load(2000, 200, overlap="two_batch"),
        0,
        2785,
        -0.66,
        _LMSYS_H100,
    ),
    _decode(
        "SGLang, 48 GPUs of a GB200 NVL72, FP8",
        "gb200x48",
        "fp8",
        Layout(1, 48, 48),
        Load(2000, 1000),
        0,
        9087,
        -0.27,
        _LMSYS_GB200,
    ),
    _decode(
        "SGLang, 48 GPUs of a GB200 NVL72, FP8 attention, NVFP4 experts",
        "gb200x48",
        "nvfp4_fp8+kv8",
        Layout(1, 48, 48),
        Load(2000, 1000),
        0,
        13386,
        -0.27,
        _LMSYS_GB200,
    ),
    _decode(
        "vLLM, wide EP on H200",
        "h200x16",
        "fp8",
        Layout(1, 16, 16),
        Load(2000, 1000),
        0,
        2200,
        -0.05,
        _VLLM,
    ),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the planner says about a case.

    Attributes:
      case: the case.
      rate: predicted output tokens/s/GPU, of the decoding GPUs.
      batch: sequences per attention copy that it is for.
      low, high: 80 % band of the rate.
    """

    case: Case
    rate: float
    batch: int
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.rate / self.case.rate

    @property
    def inside(self) -> bool:
        """Whether the measured rate is within the band."""
        return self.low <= self.case.rate <= self.high


def outcome(case: Case) -> Outcome:
    """Predicts one case."""
    from moelab.plan import serving

    model, recipe = published.find(case.model), recipes.named(case.precision)
    system = hardware.system(case.system)
    most = float(
        serving.largest_batch(model, recipe, system.gpu, case.layout, case.load).reshape(-1)[0]
    )
    batches = [b for b in search.BATCHES if b <= max(most, 1)]
    batch = np.array([case.batch] if case.batch else batches)
    options = search.Options(years=case.years)
    found = search.evaluate(model, recipe, system, case.layout, batch, case.load, options)
    # The published rates of disaggregated serving are those of the decoding GPUs alone.
    rate = batch * np.asarray(case.layout.dp) / found.tpot / case.layout.gpus
    best = int(np.argmax(rate))
    bands = (float(rate[best] / found.high[best]), float(rate[best] / found.low[best]))
    return Outcome(case, float(rate[best]), int(batch[best]), *bands)


def outcomes() -> tuple[Outcome, ...]:
    """Predicts every case."""
    return tuple(map(outcome, CASES))
