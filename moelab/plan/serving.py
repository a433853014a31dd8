"""Serving: time per output token, time to first token, throughput, memory, for rows of configurations.

A replica serves `batch` sequences per attention copy. Aggregated, the same GPUs read prompts between decoding steps
(chunked into them, which changes who waits, not the mean):

    TPOT = t_decode(B) + (B / osl) m t_prompt(isl)

Disaggregated, other GPUs read the prompts and TPOT = t_decode(B).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from moelab.plan import roofline, work
from moelab.plan.hardware import Gpu
from moelab.plan.models import Model
from moelab.plan.recipes import Recipe
from moelab.plan.roofline import Efficiency, Terms
from moelab.plan.work import Layout

RESERVED = 0.04  # of the memory: workspace, graphs, fragmentation (an assumption; 3.5 GB of 80 in the wheel)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of the replica.

    Attributes:
      isl, osl: tokens of prompt and answer.
      draft: tokens that speculative decoding proposes per step; 0: none.
      acceptance: probability that a proposed token is accepted, given those before it.
      overlap: "none" or "two_batch" (of the exchange between experts' ranks).
      disaggregated: prompts are read by other GPUs.
      by_load: experts are placed by load; False: in order, whatever the load.
      p_E: how likely the experts are; None: equally.
    """

    isl: int
    osl: int
    draft: int = 0
    acceptance: float = 0.7
    overlap: str = "none"
    disaggregated: bool = False
    by_load: bool = True
    p_E: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def tokens_per_step(self) -> float:
        """Expects 1 + a + a^2 + ... + a^draft."""
        return float(sum(self.acceptance**i for i in range(self.draft + 1)))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The terms of rows of configurations; `tpot` turns them into times for any efficiencies.

    Attributes:
      decode: one decoding step.
      prompt: reading one prompt, without what is fixed.
      share_n: prompts that are read per decoding step.
      tokens: output tokens of a sequence per decoding step.
    """

    decode: Terms
    prompt: Terms
    share_n: np.ndarray
    tokens: float = 1.0


def free_bytes(model: Model, recipe: Recipe, gpu: Gpu, layout: Layout) -> np.ndarray:
    """Returns bytes of one GPU that are left for keys and values; negative: the weights do not fit."""
    return gpu.memory.value * (1 - RESERVED) - work.weight_bytes(model, recipe, layout)


def largest_batch(model: Model, recipe: Recipe, gpu: Gpu, layout: Layout, load: Load) -> np.ndarray:
    """Returns how many sequences of an attention copy fit, on average half-way through their answers."""
    sequence = work.kv_bytes(model, recipe, layout, load.isl + load.osl / 2)
    return np.maximum(free_bytes(model, recipe, gpu, layout), 0) / sequence


def prepare(
    model: Model,
    recipe: Recipe,
    gpu: Gpu,
    layout: Layout,
    batch,
    isl,
    osl,
    load: Load | None = None,
) -> Prepared:
    """Counts the work of rows; everything may be an array.

    Args:
      batch: sequences per attention copy, whether they fit or not.
      isl, osl: tokens.
      load: for speculation and skew; its isl and osl are not used.
    """
    load = load or Load(0, 0)
    batch = np.asarray(batch, float)
    decode = work.terms(
        model,
        recipe,
        gpu,
        layout,
        batch * (1 + load.draft),
        np.asarray(isl) + np.asarray(osl) / 2,
        sequences=batch,
        p_E=load.p_E,
        by_load=load.by_load,
    )
    if load.draft:  # the drafting layers: one per proposed token, of the model's own kind
        layers = 1 + load.draft / model.layers / (1 + load.draft)
        decode = decode.scaled(layers)
    prompt = work.terms(
        *(model, recipe, gpu, layout, isl, np.asarray(isl) / 2),
        sequences=np.ones_like(np.asarray(isl, float)),
        p_E=load.p_E,
        by_load=load.by_load,
        decoding=False,
    )
    share = batch * load.tokens_per_step / np.asarray(osl, float)
    share = np.zeros_like(share) if load.disaggregated else share
    return Prepared(decode, prompt, np.atleast_1d(share), load.tokens_per_step)


def decode_time(
    prepared: Prepared, efficiency: Efficiency, engine=0, years=0.0, overlap: str = "none"
) -> np.ndarray:
    """Returns seconds of one decoding step without prompts, (n,)."""
    return roofline.time(prepared.decode, efficiency, engine, years, overlap)


def prompt_time(
    prepared: Prepared, efficiency: Efficiency, engine=0, years=0.0, overlap: str = "none"
) -> np.ndarray:
    """Returns seconds of reading one prompt alone, (n,)."""
    return roofline.time(prepared.prompt, efficiency, engine, years, overlap)


def tpot(
    prepared: Prepared, efficiency: Efficiency, engine=0, years=0.0, overlap: str = "none"
) -> np.ndarray:
    """Returns seconds per output token of a sequence, (n,)."""
    own = roofline.operations(prepared.prompt, efficiency).sum(0)
    own = own + roofline.links(prepared.prompt, efficiency)
    step = decode_time(prepared, efficiency, engine, years, overlap)
    return (step + efficiency.mixing * prepared.share_n * own) / prepared.tokens


def ttft(
    prepared: Prepared, efficiency: Efficiency, engine=0, years=0.0, overlap: str = "none"
) -> np.ndarray:
    """Returns seconds to the first token: waiting for a running step, and for the prompts before, then the prompt.

    A closed loop of B sequences keeps the share u = (B / osl) t_prompt / TPOT of the time busy with prompts; the wait
    is that of a queue with constant service, u / (2 (1 - u)) prompts. Faster decoding of as many sequences brings more
    prompts, so that the wait can grow with the hardware. Bursts and schedulers are not in it: no promise.
    """
    prompt = prompt_time(prepared, efficiency, engine, years, overlap)
    step = tpot(prepared, efficiency, engine, years, overlap) * prepared.tokens
    busy = np.minimum(prepared.share_n * prompt / np.maximum(step, 1e-12), 0.95)
    return prompt * (1 + busy / (2 * (1 - busy))) + step
