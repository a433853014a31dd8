"""Prices, training, attribution, evidence and claims: arithmetic by hand, and what must hold."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from moelab.errors import UserError
from moelab.plan import (
    attribution,
    calibration,
    claims,
    claims_costs,
    clouds,
    evidence,
    figures,
    hardware,
    joint,
    measured,
    named,
    prices,
    published,
    recipes,
    search,
    serving,
    training,
)
from moelab.plan import claim as claim_lib
from moelab.plan.attribution import Way
from moelab.plan.work import Layout

V3 = published.find("deepseek_v3")
LOAD = serving.Load(8192, 1024)


def every_figure():
    for gpu, table in prices.PRICES.items():
        yield from ((f"price {gpu} {basis}", figure) for basis, figure in table.items())
    yield from (("wall", prices.WALL), ("pue", prices.PUE))
    yield from evidence.EVIDENCE.items()


@pytest.mark.parametrize(
    ("name", "figure"), list(every_figure()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_constant_has_a_source_and_a_date(name, figure):
    assert figure.unit and figure.source.text and math.isfinite(figure.value)
    assert re.fullmatch(r"20\d\d(-\d\d){0,2}", figure.source.date)
    assert figure.source.status in figures.STATUSES


def test_every_other_source_has_a_date():
    sources = [i.source for i in clouds.INSTANCES] + [r.source for r in training.published_rows()]
    for model in published.MODELS.values():
        sources += [model.source, *([model.published] if model.published else [])]
    assert len(sources) > 40
    assert all(s.text and re.fullmatch(r"20\d\d(-\d\d){0,2}", s.date) for s in sources)


def test_dollars_and_joules():
    # 2 $/h over 3600 s over 1000 tokens/s = 0.5556 $ per million; used half of the time, twice that
    assert prices.per_million(2.0, 1000) == pytest.approx(0.5556, abs=1e-4)
    assert prices.per_million(2.0, 1000, 0.5) == pytest.approx(1.1111, abs=1e-4)
    # 1000 W x 1.25 at the wall x 1.25 for cooling over 625 tokens/s
    assert prices.joules(1000, 625) == pytest.approx(2.5)
    assert prices.break_even(300, 100) == 3


@pytest.mark.parametrize(
    ("gpu", "basis", "message"),
    [
        ("b200", "cheap", "no price basis 'cheap'; there are owner"),
        ("b200", "hyperscale", "did you mean hyperscaler"),
        ("b300", "owner", "known are blended; give dollars"),
        ("a100", "owner", "none is known"),
        ("b200", "-1", "above 0, got -1"),
    ],
)
def test_wrong_prices(gpu, basis, message):
    with pytest.raises(prices.PriceError, match=message):
        prices.find(gpu, basis)


def test_ones_own_price():
    assert prices.find("anything", "3.25").value == 3.25


def job(**changed):
    return training.Job(
        **({"precision": "bf16", "pp": 4, "ep": 32, "global_batch": 2048} | changed)
    )


def test_a_training_step_adds_up():
    step = training.step(V3, hardware.system("gb200x256"), job())
    tokens = 2048 * 4096
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert step.tokens_per_gpu == pytest.approx(tokens / step.seconds / 256)
    assert step.flops_per_gpu == pytest.approx(step.tokens_per_gpu * V3.training_flops(4096))
    assert step.mfu == pytest.approx(step.flops_per_gpu / 2.5e15) and 0.1 < step.mfu < 0.6


def test_the_bubble_by_hand():
    """64 data-parallel ranks run 32 micro-batches each through 4 stages: (4 - 1) / 32 of the busy time."""
    parts = training.step(V3, hardware.system("gb200x256"), job()).parts
    busy = sum(v for n, v in parts.items() if n not in ("bubble", "gradients, not hidden"))
    assert parts["bubble"] == pytest.approx(3 / 32 * busy)


def test_wider_experts_over_network_cards_cost_more():
    inside, outside = (
        training.step(V3, hardware.system(s), job(ep=64)).parts for s in ("gb200x256", "b200x256")
    )
    name = "exchange between experts' ranks, not hidden"
    assert outside[name] > 2 * inside[name]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"precision": "fp4"}, "training computes in bf16, fp8, mxfp8, nvfp4, not in 'fp4'"),
        ({"pp": 3}, "256 GPUs cannot be dealt into tp 1 x pp 3 = 3"),
        ({"ep": 48}, "ep 48 wants a divisor of the 64 GPUs"),
        ({"ep": 512, "pp": 1, "global_batch": 4096}, "ep 512"),
        ({"pp": 64, "ep": 1}, "more than the 61 layers"),
        ({"global_batch": 100}, "cannot be dealt to 64 data-parallel ranks"),
    ],
)
def test_wrong_degrees(changed, message):
    with pytest.raises(UserError, match=message):
        training.step(V3, hardware.system("gb200x256"), job(**changed))


def test_training_without_the_precision():
    with pytest.raises(hardware.HardwareError, match="no fp4 tensor cores"):
        training.step(V3, hardware.system("h100x256"), job(precision="nvfp4"))


def test_the_search_of_degrees_fits():
    found, step = training.search(V3, hardware.system("gb200x256"), job())
    assert step.fits
    assert (
        step.tokens_per_gpu >= training.step(V3, hardware.system("gb200x256"), job()).tokens_per_gpu
    )
    with pytest.raises(UserError, match=r"\d+ bytes too many per GPU"):
        training.search(V3, hardware.system("h100x8"), job(global_batch=64))


def test_published_training_rates():
    """No hold-out here: 18 rows set three numbers. Recipes of one chip differ by two, and so do the errors."""
    ratios = []
    for row in training.published_rows():
        system = hardware.system(row.system)
        step = training.step(published.find(row.model), system, row.job)
        ratios.append(row.tokens_per_gpu / step.tokens_per_gpu)
    assert len(ratios) == 18
    assert np.median(np.abs(np.log(ratios))) < math.log(1.35)
    inside = [training.BAND[0] <= r <= training.BAND[1] for r in ratios]
    assert 0.7 <= np.mean(inside) <= 0.95


def test_shapley_by_hand():
    # v = 1 if a; 2 if b; 5 if both: a is worth (1 + 3) / 2, b (2 + 4) / 2
    value = {frozenset(): 0, frozenset("a"): 1, frozenset("b"): 2, frozenset("ab"): 5}
    assert attribution.shapley(("a", "b"), value.__getitem__) == {"a": 2.0, "b": 3.0}


def way(system, precision, **load):
    return Way(hardware.system(system), recipes.named(precision), dataclasses.replace(LOAD, **load))


@pytest.mark.parametrize("user", [30, 60])
def test_factors_multiply_to_the_gain(user):
    found = attribution.equal_interactivity(V3, way("h200x8", "fp8"), way("b200x8", "nvfp4"), user)
    assert math.prod(found.factors.values()) == pytest.approx(found.gain)
    assert set(found.factors) == {
        "silicon",
        "bandwidth",
        "fp4_bytes",
        "fp4_flops",
        "memory",
        "width",
    }
    assert found.factors["bandwidth"] > 1.2 and found.gain > 2


def test_shares_have_intervals_over_what_the_calibration_could_be():
    found = attribution.equal_configuration(
        V3, way("h200x8", "fp8"), way("b200x8", "nvfp4"), Layout(8), 32
    )
    assert set(found.intervals) == {*found.factors, "gain"}
    for name, (low, high) in found.intervals.items():
        value = found.gain if name == "gain" else found.factors[name]
        assert low <= high and low * 0.9 < value < high * 1.1
    low, high = found.intervals["bandwidth"]
    assert high / low > 1.01
    # the bounds come from drawing the calibration again: one draw alone, no interval
    shipped = calibration.shipped()
    single = dataclasses.replace(shipped, draws={n: v[:1] for n, v in shipped.draws.items()})
    alone = attribution.equal_configuration(
        *(V3, way("h200x8", "fp8"), way("b200x8", "nvfp4"), Layout(8), 32),
        search.Options(calibration=single),
    )
    assert alone.intervals["gain"][0] == alone.intervals["gain"][1]


def test_what_does_not_differ_is_no_cause():
    a, b = way("b200x8", "fp8"), way("b200x8", "nvfp4")
    assert attribution.causes(a, b) == ("fp4_bytes", "fp4_flops")
    later = dataclasses.replace(a, years=0.5)
    assert attribution.causes(a, later) == ("software",)
    assert attribution.causes(a, way("b200x8", "fp8", draft=1)) == ("speculation",)
    assert attribution.causes(way("h200x8", "fp8"), way("h100x8", "fp8")) == ("bandwidth", "memory")


def test_mixed_ways():
    a, b = way("h200x8", "fp8"), way("b200x8", "nvfp4")
    half = attribution.mixed(a, b, frozenset({"fp4_flops"}))
    # fp4 on Hopper's silicon: its FP8 peak times Blackwell's ratio, 2
    assert half.system.gpu.peak("fp4") == pytest.approx(1.978e15 * 2)
    assert half.recipe.bits["experts"] == recipes.named("fp8").bits["experts"]
    assert half.recipe.compute["experts"] == "fp4"
    both = attribution.mixed(a, b, frozenset(attribution.CAUSES))
    assert both.system.gpu.bandwidth == b.system.gpu.bandwidth and both.recipe.bits == b.recipe.bits
    neither = attribution.mixed(a, b, frozenset())
    assert neither.system.gpu.memory == a.system.gpu.memory


def test_a_speed_that_nothing_reaches():
    with pytest.raises(UserError, match="tokens/s/user at most, not 1000"):
        attribution.equal_interactivity(V3, way("h200x8", "fp8"), way("b200x8", "fp8"), 1000)


def test_memory_counts_where_it_binds():
    """Long contexts at low speed fill H200's memory; at equal configuration memory is no cause."""
    long = {"isl": 32768, "osl": 4096}
    a, b = way("h200x8", "fp8", **long), way("b200x8", "fp8", **long)
    free = attribution.equal_interactivity(V3, a, b, 8)
    assert free.factors["memory"] > 1.05
    equal = attribution.equal_configuration(V3, a, b, Layout(8), 8)
    assert "memory" not in equal.factors


needs_wheel = pytest.mark.skipif(measured.folder() is None, reason="extra plan-data not installed")


@needs_wheel
def test_measured_pairs_and_the_model_agree():
    """FP8 to FP4 on the same GPU at equal configuration: what was measured, and what is modelled."""
    found = evidence.measured_pairs()["fp8 to fp4"]
    assert len(found.ratios) > 100 and 1.1 < found.median < 1.4
    model = attribution.equal_configuration(
        V3, way("b200x8", "fp8"), way("b200x8", "nvfp4"), Layout(8), 32
    )
    low, high = found.quartiles
    assert low < model.gain < high


@needs_wheel
def test_pairs_by_hand():
    rows, _ = measured.rows()
    one = next(r for r in rows if r.gpu == "b200" and r.raw["precision"] == "fp8")
    other = dataclasses.replace(one, tpot=one.tpot / 2, raw={**one.raw, "precision": "fp4"})
    alone = dataclasses.replace(other, batch=9999)
    found = evidence.pairs([one, other, alone], "precision", "fp8", "fp4")
    assert found.ratios.tolist() == [pytest.approx(2.0)]


@pytest.fixture(scope="module")
def report():
    return claims.report()


def test_every_claim_has_a_test_a_verdict_and_sources(report):
    _, found = report
    assert len(found) == 10 and len({c.name for c in found}) == 10
    for claim in found:
        assert claim.verdict in claim_lib.VERDICTS and claim.test and claim.because
        for what, _ in claim.evidence:  # a modelled gain is never without its interval
            gains = re.findall(r"\d\.\d\dx \[", what)
            assert "modelled" not in what or gains or "80 % band" in what
        assert all(what and source for what, source in claim.evidence)
    assert {c.verdict for c in found} == set(claim_lib.VERDICTS)


def test_verdicts_follow_from_the_numbers(report):
    shared, found = report
    by_name = {c.name: c for c in found}
    assert by_name["fp4_doubles"].verdict == "not supported"
    # 1.55 times as fast: more than the ratio of owners' prices (1.95 / 1.41), less than that of AWS's (14.24 / 8)
    assert by_name["new_gpu"].verdict == "partly"
    tenfold = dataclasses.replace(
        shared.whole, factors={"fp4_bytes": 9.0, "silicon": 1.1}, after=9.9 * shared.whole.before
    )
    assert claims_costs.collapse(dataclasses.replace(shared, whole=tenfold)).verdict == "supported"
    nothing = dataclasses.replace(shared.whole, after=1.01 * shared.whole.before)
    assert (
        claims_costs.collapse(dataclasses.replace(shared, whole=nothing)).verdict == "not supported"
    )
    twice = evidence.Pairs("x", np.array([2.0, 2.1]))
    pairs = shared.pairs | {"fp8 to fp4": twice}
    assert claims._doubles(dataclasses.replace(shared, pairs=pairs)).verdict == "supported"
    assert claims._lossless(dataclasses.replace(shared, gaps=())).verdict == "not testable here"
    gap = evidence.Gap("nvfp4_wa", "NVFP4", (0.0001, -0.001, 0.001), None, 2.4)
    assert claims._lossless(dataclasses.replace(shared, gaps=(gap,))).verdict == "supported"


def test_claims_and_plan_speak_of_the_same_point(report, capsys):
    """One operating point, one number: `plan`, `compare` and `claims` with their defaults."""
    from moelab import cli

    shared, _ = report
    words = ["--json", "--hardware=h200x8,b200x8", "--precision=fp8,nvfp4", "--user=50"]
    assert cli.main(["plan", *words]) == 0
    before, after = json.loads(capsys.readouterr().out)["equal_speed"]
    assert shared.whole.before == pytest.approx(before["gpu_tokens_per_s"])
    assert shared.whole.after == pytest.approx(after["gpu_tokens_per_s"])
    assert cli.main(["plan", "compare", "--json"]) == 0
    equal = json.loads(capsys.readouterr().out)[1]
    assert equal["factors"] == pytest.approx(shared.whole.factors)
    rows = {row["precision"]: row for row in joint.rows(shared)}
    assert rows["nvfp4_wa"]["tokens_per_s_gpu"] == pytest.approx(after["gpu_tokens_per_s"])


def test_quality_is_joined_to_cost(report):
    shared, _ = report
    rows = {row["precision"]: row for row in joint.rows(shared)}
    assert rows["fp8_wa"]["gain_over_fp8"] == 1
    nvfp4 = rows["nvfp4_wa"]
    assert nvfp4["low"] < nvfp4["bits_per_byte"] < nvfp4["high"] and nvfp4["gain_over_fp8"] > 1.1
    # 1.95 $/h of a B200
    assert nvfp4["dollars_per_million"]["owner"] == pytest.approx(
        1.95 / 3600 / nvfp4["tokens_per_s_gpu"] * 1e6
    )
    study = {g.precision: g for g in evidence.quality()}
    assert study["nvfp4_wa"].bits[0] == nvfp4["bits_per_byte"]


def test_what_a_new_gpu_costs_decides_whether_it_pays(report):
    shared, _ = report
    for gain, verdict in ((2.1, "supported"), (1.55, "partly"), (1.2, "not supported")):
        pairs = {"h200 to b200": evidence.Pairs("h200 to b200", np.array([gain]))}
        assert claims_costs.silicon(dataclasses.replace(shared, pairs=pairs)).verdict == verdict
    unpriced = dataclasses.replace(shared.point, after=("b300x8", "nvfp4"))
    found = claims_costs.silicon(dataclasses.replace(shared, point=unpriced))
    assert found.verdict == "not testable here" and "modelled, h200 to b300" in found.because


def test_measured_pairs_are_of_the_point_or_not_used(report):
    """Pairs of FP8 and FP4 say nothing about bfloat16."""
    shared, _ = report
    point = dataclasses.replace(shared.point, before=("h200x8", "bf16"))
    pairs = {"fp8 to fp4": evidence.Pairs("x", np.array([9.0]))}
    other = claims._doubles(dataclasses.replace(shared, point=point, pairs=pairs))
    assert "9.00x" not in other.because
    assert "9.00x" in claims._doubles(dataclasses.replace(shared, pairs=pairs)).because


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"after": ("h200x8", "fp8")}, "are the same: h200x8:fp8"),
        ({"after": ("b200x8", "bf16")}, "wants SYSTEM:nvfp4 or another of 4 bits, got b200x8:bf16"),
    ],
)
def test_points_that_test_nothing(changed, message):
    with pytest.raises(UserError, match=message):
        claims.report(claim_lib.Point(**changed))


def test_clouds_count_where_a_source_names_the_machine(report, monkeypatch):
    shared, found = report
    claim = next(c for c in found if c.name == "clouds")
    text = " ".join(what for what, _ in claim.evidence)
    assert text.count("(unverified)") == sum(not i.verified for i in clouds.INSTANCES) == 2
    assert claim.verdict == "supported" and "AWS p6-b200: b200, 14.24 $/GPU-hour" in text
    fewer = [i for i in clouds.INSTANCES if i.cloud != "Azure" or i.gpu in ("h100", "gb300")]
    memory = dataclasses.replace(fewer[0].source, status="unverified")
    unsure = [dataclasses.replace(i, source=memory) if i.gpu == "gb300" else i for i in fewer]
    monkeypatch.setattr(clouds, "INSTANCES", tuple(unsure))
    partly = claims_costs.sold_by_clouds(shared)
    assert partly.verdict == "partly" and "none at Azure" in partly.because
    everywhere = [dataclasses.replace(i, source=memory) for i in unsure]
    monkeypatch.setattr(clouds, "INSTANCES", tuple(everywhere))
    assert claims_costs.sold_by_clouds(shared).verdict == "not testable here"


def test_published_rates_that_are_in_no_fit():
    """No bar: others' best points of other dates. The planner is too fast at maximum load on Hopper, by up to 3.5."""
    found = named.outcomes()
    assert len(found) == 21 and all(o.case.source.text and o.case.source.date for o in found)
    assert np.mean([o.inside for o in found]) >= 0.6
    assert 0.7 < np.median([o.ratio for o in found]) < 1.6
    wide = [o for o in found if int(np.max(o.case.layout.ep)) >= 48]
    assert len(wide) == 5 and all(0.6 < o.ratio < 1.6 for o in wide)


def test_stages_of_a_pipeline_keep_the_keys_of_all_batches_on_their_way():
    from moelab.plan import work

    one, four = (
        work.kv_bytes(V3, recipes.named("fp8"), Layout(1, 1, 1, pp), 1000) for pp in (1, 4)
    )
    assert one == four  # a quarter of the layers, four batches
