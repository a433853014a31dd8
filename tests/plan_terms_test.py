"""What a step's terms are made of, by hand: links, drafted tokens, pipelines, the fullest rank, two half batches."""

import dataclasses
import math

import numpy as np
import pytest

from moelab.plan import coverage, hardware, published, recipes, roofline, search, serving, work
from moelab.plan.work import Layout

MIXTRAL = published.find("mixtral_8x7b")
B200 = hardware.find("b200")
FP8 = recipes.named("fp8")


def test_all_reduces_by_hand():
    """32 layers reduce twice, each a ring: 2 x 7/8 of 10 tokens of 4096 values of 2 bytes."""
    terms = work.terms(MIXTRAL, FP8, B200, Layout(8), 10, 100)
    sent = 32 * 2 * (2 * 7 / 8) * 10 * 4096 * 2
    assert terms.link_Ln[0] * 900e9 == pytest.approx(sent)
    assert terms.link_Ln[1] == 0 and terms.collectives_n == 64


def test_exchange_by_hand():
    """2 of 8 experts on 8 ranks: 1.875 ranks a token, of which an eighth is its own; FP8 there, bfloat16 back."""
    inside, outside = work.exchange(MIXTRAL, FP8, B200, np.array([8.0]), np.array([8.0]), 100, True)
    assert inside == pytest.approx(100 * 1.875 * 7 / 8 * 4096 * (1 + 2)) and outside == 0
    bf16, _ = work.exchange(
        MIXTRAL, recipes.named("bf16"), B200, np.array([8.0]), np.array([8.0]), 100, True
    )
    assert bf16 == pytest.approx(inside * 4 / 3)


def test_a_faster_step_reads_more_prompts():
    """Drafting with half accepted ends answers 1.5 times as fast, and each needs its prompt read."""
    load = serving.Load(1000, 100, draft=1, acceptance=0.5)
    prepared = serving.prepare(MIXTRAL, FP8, B200, Layout(8), 40, 1000, 100, load)
    assert prepared.tokens == 1.5 and prepared.share_n == 40 * 1.5 / 100


@pytest.mark.parametrize("layout", [Layout(2, 1, 1, 4), Layout(1, 4, 4, 2), Layout(8)])
def test_throughput_by_hand(layout):
    """Each of pp stages has a batch of each of dp attention copies on its way."""
    load = serving.Load(1000, 100)
    found = search.evaluate(MIXTRAL, FP8, hardware.system("b200x8"), layout, 16, load)
    sequences = 16 * layout.dp * layout.pp
    assert found.throughput[0] == pytest.approx(sequences / found.tpot[0] / 8)


def test_the_fullest_of_ranks_by_hand():
    """sqrt(2 ln R) standard deviations above the mean: 2 of them for R = e^2."""
    assert coverage.fullest(10.0, 9.0, math.exp(2)) == pytest.approx(10 + 2 * 3)


def test_two_half_batches_by_hand():
    """Weights are read by both halves, keys by each its own: 2 x 1 + 0.5 s over 2 s of links."""
    zeros = np.zeros((5, 1))
    memory = zeros.copy()
    memory[roofline.OPERATIONS.index("experts")] = 1.0
    memory[roofline.OPERATIONS.index("core")] = 0.5
    whole = np.zeros((5, 1), int)
    link, one = np.array([[2.0], [0.0]]), np.zeros(1)
    terms = roofline.Terms(zeros, memory, whole, whole, link, one, one, one)
    assert roofline.time(terms, roofline.PEAK) == 3.5
    assert roofline.time(terms, roofline.PEAK, overlap="two_batch") == 2.5
    slow = dataclasses.replace(terms, link_Ln=link / 8)  # little to hide: it is left off
    assert roofline.time(slow, roofline.PEAK, overlap="two_batch") == 1.75


@pytest.mark.parametrize("name", ["bandwidth", "nvlink", "nic", "peak_fp8", "peak_bf16"])
@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss_120b"])
def test_better_hardware_is_never_slower(name, model):
    system, shape = hardware.system("b200x16"), published.find(model)
    load = serving.Load(2048, 512)
    layout, batch = search.candidates(shape, FP8, system, load)
    some = slice(None, None, 7)
    layout = Layout(*(getattr(layout, n)[some] for n in ("tp", "dp", "ep", "pp")))
    before = search.evaluate(shape, FP8, system, layout, batch[some], load)
    gpu = system.gpu
    figure = gpu.figures()[name]
    better = dataclasses.replace(figure, value=1.5 * figure.value)
    if name.startswith("peak_"):
        gpu = dataclasses.replace(gpu, peaks={**gpu.peaks, name.removeprefix("peak_"): better})
    else:
        gpu = dataclasses.replace(gpu, **{name: better})
    faster = hardware.System(gpu, 16)
    after = search.evaluate(shape, FP8, faster, layout, batch[some], load)
    assert (after.tpot <= before.tpot * (1 + 1e-12)).all() and (after.tpot < before.tpot).any()
    fuller = search.evaluate(shape, FP8, system, layout, 2 * batch[some], load)
    assert (fuller.throughput >= before.throughput).all() and (fuller.tpot >= before.tpot).all()
