"""Coverage, roofline, links, serving and the search: hand-worked numbers and what must hold for any model."""

import re
import time

import numpy as np
import pytest

from moelab.plan import (
    calibration,
    coverage,
    hardware,
    published,
    recipes,
    roofline,
    search,
    serving,
    work,
)
from moelab.plan.work import Layout

V3, B200 = published.find("deepseek_v3"), hardware.find("b200")
LOAD = serving.Load(8192, 1024)


@pytest.mark.parametrize(
    ("name", "tokens", "share"),
    # Fact sheet: T=64: Mixtral 1.0, Qwen3 .98, V3 and gpt-oss .87, K2 .74; T=8: .90, .40, .22, .155
    [
        ("mixtral_8x7b", 8, 0.90),
        ("qwen3_235b", 64, 0.98),
        ("qwen3_235b", 8, 0.40),
        ("deepseek_v3", 64, 0.87),
        ("gpt_oss_120b", 8, 0.22),
        ("kimi_k2", 64, 0.74),
        ("kimi_k2", 8, 0.155),
    ],
)
def test_experts_that_a_batch_touches(name, tokens, share):
    model = published.find(name)
    found = coverage.touched(coverage.uniform(model.experts, model.k), tokens) / model.experts
    assert found == pytest.approx(share, abs=0.006)


def test_coverage_agrees_with_dealing():
    """Expected experts and the fullest rank, against drawn routes."""
    generator = np.random.default_rng(0)
    p_E = coverage.skewed(64, 4, 0.5)
    assert p_E.sum() == pytest.approx(4) and p_E.max() <= 1 and (np.diff(p_E) <= 0).all()
    drawn_NTE = generator.random((400, 32, 64)) < p_E
    hit = drawn_NTE.any(1).sum(-1).mean()
    assert coverage.touched(p_E, 32) == pytest.approx(hit, rel=0.01)
    shuffled = drawn_NTE[:, :, generator.permutation(64)]
    loads = shuffled.sum(1).reshape(400, 8, 8).sum(-1).max(-1).mean()
    _, load = coverage.per_rank(p_E, 32, 8)
    assert load == pytest.approx(loads, rel=0.2) and load > 32 * 4 / 8


def test_a_skew_caps_at_certainty():
    p_E = coverage.skewed(8, 4, 3.0)
    assert p_E.sum() == pytest.approx(4) and p_E[0] == 1 and (p_E <= 1).all()


def test_one_rank_has_everything():
    hit, load = coverage.per_rank(coverage.uniform(256, 8), 10_000, 1)
    assert hit == pytest.approx(256) and load == pytest.approx(80_000)


def test_placement_by_load_leaves_chance_only():
    p_E = coverage.skewed(256, 8, 0.7)
    in_order, by_load = (coverage.per_rank(p_E, 4096, 32, x)[1] for x in (False, True))
    assert 4096 * 8 / 32 < by_load < 1.2 * 4096 * 8 / 32 < in_order


def test_decoding_one_token_reads_the_active_weights():
    """At batch 1 without overhead the plain roofline is active bytes over bandwidth."""
    recipe = recipes.named("bf16")
    prepared = serving.prepare(V3, recipe, B200, Layout(1), 1, 1, 1)
    counts = V3.parameters()
    wanted = (V3.active() - counts["embedding"] - counts["router"] - counts["rest"]) * 2
    found = serving.decode_time(prepared, roofline.PEAK)[0] * B200.bandwidth.value
    assert found == pytest.approx(wanted, rel=1e-3)


def test_prompts_are_bound_by_compute():
    recipe = recipes.named("bf16")
    n = 32768
    prepared = serving.prepare(V3, recipe, B200, Layout(8), 1, n, 1)
    flops = n * V3.forward_flops(n / 2) - (n - 1) * 2 * V3.vocab * V3.width  # one row of logits
    flops -= n * 2 * V3.sparse_layers * V3.width * V3.experts  # the router is left out
    ideal = flops / (8 * B200.peak("bf16"))
    compute = roofline.operations(prepared.prompt, roofline.PEAK).sum()
    assert compute == pytest.approx(ideal, rel=0.02)


@pytest.mark.parametrize(
    ("gpu", "ranks", "microseconds"),
    # Measured dispatch + combine per layer at 128 tokens a GPU: DeepEP on H100 within a node and over 4 nodes, the
    # NVLink exchange of GB200 over 8 and 64 GPUs (fact sheet, 0.6). Only the card's prior knows of the second.
    [("h100", 8, 40 + 72), ("h100", 32, 143 + 263), ("gb200", 8, 23 + 37), ("gb200", 64, 28 + 43)],
)
def test_exchange_between_ranks(gpu, ranks, microseconds):
    gpu, values = hardware.find(gpu), calibration.shipped().efficiency
    sizes = (np.array([float(ranks)]), np.array([float(ranks)]), np.array([128.0]))
    inside, outside = work.exchange(V3, recipes.named("fp8"), gpu, *sizes, True)
    seconds = inside / gpu.nvlink.value / values.link[0] + outside / gpu.nic.value / values.link[1]
    found = 1e6 * float(seconds[0] + 2 * values.collective)
    assert found == pytest.approx(microseconds, rel=0.25)


def test_two_batches_never_cost_more_than_none():
    layout = Layout(1, np.array([8, 32, 64]), np.array([8, 32, 64]))
    prepared = serving.prepare(
        V3, recipes.named("fp8"), hardware.find("gb200"), layout, 128, 2048, 512
    )
    values = calibration.shipped().efficiency
    for seconds, gains in ((serving.decode_time, False), (serving.prompt_time, True)):
        alone, both = (seconds(prepared, values, overlap=x) for x in ("none", "two_batch"))
        assert (both <= alone).all()
        assert not gains or (both < 0.95 * alone).any()


def test_speculation_is_a_switch():
    """Two drafted tokens, 0.7 accepted: 1 + 0.7 + 0.49 tokens a step, and the experts of three times the tokens."""
    load = serving.Load(1024, 1024, draft=2, acceptance=0.7)
    assert load.tokens_per_step == pytest.approx(2.19)
    args = (V3, recipes.named("fp8"), B200, Layout(8), 4, 1024, 1024)
    plain, drafted = serving.prepare(*args), serving.prepare(*args, load)
    experts = roofline.OPERATIONS.index("experts")
    p_E = coverage.uniform(256, 8)
    ratio = coverage.touched(p_E, 12) / coverage.touched(p_E, 4) * (1 + 2 / 61 / 3)
    found = drafted.decode.memory_On[experts] / plain.decode.memory_On[experts]
    assert found[0] == pytest.approx(ratio)
    values = calibration.shipped().efficiency
    assert serving.tpot(drafted, values)[0] < serving.tpot(plain, values)[0]


def test_tensor_parallelism_does_not_split_a_latent():
    """Keys of latent attention are on every GPU; heads of grouped attention are split until there are no more."""
    assert work.kv_share(V3, np.array([1, 8])).tolist() == [1, 1]
    assert work.kv_share(published.find("qwen3_235b"), np.array([2, 4, 8])).tolist() == [
        0.5,
        0.25,
        0.25,
    ]


def test_more_memory_bandwidth_is_never_slower():
    found = search.search(
        V3, recipes.named("fp8"), hardware.system("h200x16"), serving.Load(1024, 256)
    )
    faster = hardware.System(hardware.find("b200"), 16)
    again = search.evaluate(
        *(V3, recipes.named("fp8"), faster, found.layout, found.batch, serving.Load(1024, 256))
    )
    assert (again.tpot <= found.tpot).all()


def test_the_front_is_a_front():
    found = search.search(V3, recipes.named("nvfp4"), hardware.system("b200x8"), LOAD)
    front = found.front()
    assert (np.diff(found.user[front]) < 0).all() and (np.diff(found.throughput[front]) > 0).all()
    for i in front:  # nothing beats it in both
        assert not ((found.user > found.user[i]) & (found.throughput > found.throughput[i])).any()
    assert (found.used <= B200.memory.value).all()
    best = found.at_speed(50)
    assert found.user[best] >= 50
    assert found.throughput[best] == found.throughput[found.user >= 50].max()
    assert found.at_speed(1e9) is None


def test_limits_are_kept():
    options = search.Options(most_tpot=0.02, most_ttft=0.5)
    found = search.search(V3, recipes.named("nvfp4"), hardware.system("b200x8"), LOAD, options)
    assert found.tpot.max() <= 0.02 and found.ttft.max() <= 0.5
    with pytest.raises(search.UserError, match="the limits leave nothing; the fastest"):
        search.search(
            *(V3, recipes.named("nvfp4"), hardware.system("b200x8"), LOAD),
            search.Options(most_tpot=1e-6),
        )


def test_a_model_that_does_not_fit_says_by_how_many_bytes():
    with pytest.raises(
        search.DoesNotFit, match=r"kimi_k2 in bf16 .* (\d+) bytes too many"
    ) as error:
        search.search(
            published.find("kimi_k2"), recipes.named("bf16"), hardware.system("h100x8"), LOAD
        )
    excess = int(re.search(r"(\d+) bytes too many", str(error.value))[1])
    # 2.0528 TB over 8 GPUs, 0.4 GB of what is on all of them, a sequence; 80 GB less 4 %
    assert excess == pytest.approx(2.0528e12 / 8 - 76.8e9, rel=0.02)


def test_room_for_keys_by_hand():
    """B200: 180 GB less 4 %; V3 in FP8 on 8 GPUs; a latent of 61 x 576 FP8 elements a token is on every GPU."""
    recipe, layout = recipes.named("fp8+kv8"), Layout(8)
    room = 180e9 * 0.96 - float(work.weight_bytes(V3, recipe, layout))
    assert serving.free_bytes(V3, recipe, B200, layout) == pytest.approx(room)
    found = serving.largest_batch(V3, recipe, B200, layout, LOAD)
    assert found == pytest.approx(room / (61 * 576 * (8192 + 512)))


def test_a_precision_that_the_gpu_lacks():
    with pytest.raises(hardware.HardwareError, match="has no fp4 tensor cores"):
        search.search(V3, recipes.named("nvfp4"), hardware.system("h200x8"), LOAD)


def test_what_is_outside_the_calibrated_range_says_so():
    shipped = calibration.shipped()
    inside = search.evaluate(
        V3, recipes.named("nvfp4"), hardware.system("b200x8"), Layout(8), 32, LOAD
    )
    assert inside.row(0)["outside_calibrated_range"] == []
    assert inside.low[0] == pytest.approx(np.exp(shipped.band[0]))
    huge = published.find("hypothetical_10t")
    outside = search.evaluate(
        huge, recipes.named("nvfp4"), hardware.system("gb200"), Layout(8, 9, 72), 32, LOAD
    )
    notes = outside.row(0)["outside_calibrated_range"]
    assert any("parameters" in n for n in notes) and any("gpu gb200" in n for n in notes)
    assert outside.low[0] <= 0.5 and outside.high[0] >= 2


def test_prompts_on_other_gpus_make_answers_faster():
    args = (V3, recipes.named("nvfp4"), hardware.system("b200x8"), Layout(8), 32)
    together = search.evaluate(*args, LOAD)
    apart = search.evaluate(*args, serving.Load(8192, 1024, disaggregated=True))
    assert apart.tpot[0] < together.tpot[0]
    alone = 32 / apart.tpot[0] / 8
    assert apart.throughput[0] < alone  # the prefill GPUs count


def test_a_rack_is_searched_in_seconds():
    start = time.process_time()
    found = search.search(V3, recipes.named("nvfp4"), hardware.system("gb200x72"), LOAD)
    assert time.process_time() - start < 5
    assert len(found.batch) > 1000 and len(found.front()) > 10


def test_wrong_calibrations(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(search.UserError, match="is no calibration"):
        calibration.load(path)


@pytest.mark.parametrize(
    ("system", "precision"), [("h100x8", "fp8"), ("b200x1", "nvfp4"), ("h200x8", "bf16")]
)
def test_what_is_said_to_fit_does(system, precision):
    """The alternatives of the message are plans, and half as many GPUs are none."""
    model, asked = V3, hardware.system(system)
    with pytest.raises(search.DoesNotFit) as caught:
        search.candidates(model, recipes.named(precision), asked, LOAD)
    other = re.search(r"it would fit (\S+)(?: or (\S+) in (\S+))?$", str(caught.value))
    more = hardware.system(other[1])
    assert len(search.candidates(model, recipes.named(precision), more, LOAD)[1])
    if other[2]:
        assert len(search.candidates(model, recipes.named(other[3]), asked, LOAD)[1])
    with pytest.raises(search.DoesNotFit):
        half = hardware.System(more.gpu, more.count // 2)
        search.candidates(model, recipes.named(precision), half, LOAD)
