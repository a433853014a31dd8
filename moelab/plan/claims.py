"""The claims about 4-bit experts, NVLink and new GPUs: each with its test, its evidence and the verdict that follows.

Verdicts are rules over the numbers where there are numbers: whoever changes the point or the calibration gets the
verdicts of that. The operating point is one for all claims, and printed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from moelab.plan import (
    attribution,
    calibration,
    clouds,
    evidence,
    hardware,
    prices,
    published,
    recipes,
    search,
)
from moelab.plan.attribution import Attribution, Way
from moelab.plan.claim import Claim, Point, Setting, setting
from moelab.plan.figures import scaled
from moelab.plan.serving import Load
from moelab.plan.work import Layout

EVERYWHERE = tuple(basis for basis in prices.BASES if basis != "low")  # offers that all can have


def report(point: Point | None = None) -> tuple[Setting, tuple[Claim, ...]]:
    """Tests every claim."""
    shared = setting(point or Point())
    return shared, tuple(test(shared) for test in TESTS)


def _published(name: str) -> tuple[str, str]:
    figure = evidence.EVIDENCE[name]
    return f"{figure}", f"{figure.source.text}, {figure.source.date} ({figure.source.status})"


def _measured(shared: Setting, name: str) -> tuple[tuple[str, str], ...]:
    if name not in shared.pairs:
        return (("measured pairs: not here, the extra plan-data is not installed", "-"),)
    return ((f"measured, {shared.pairs[name]}", "aiconfigurator-core 0.12.0, silicon_sample.csv"),)


def _gain(found: Attribution) -> str:
    """Writes a modelled gain with what it could be by the calibrated values."""
    low, high = found.intervals["gain"]
    return f"{found.gain:.2f}x [{low:.2f}, {high:.2f}]"


def _shares(found: Attribution) -> str:
    parts = ", ".join(f"{name} {factor:.2f}x" for name, factor in found.factors.items())
    return f"modelled, {found.basis}: {_gain(found)} = {parts}"


def price_ratios(point: Point) -> dict[str, float]:
    """Returns the price of the newer GPU over the older one's, by every basis that is known of both."""
    found = {basis: price_ratio(point, basis) for basis in EVERYWHERE}
    return {basis: ratio for basis, ratio in found.items() if ratio}


def _by_basis(ratios: dict[str, float]) -> str:
    return ", ".join(f"{b} {r:.2f}x" for b, r in ratios.items()) or "not known of both GPUs"


def price_ratio(point: Point, basis: str) -> float | None:
    """Returns the price of the newer GPU over the older one's; None where one is not known."""
    names = [hardware.system(s).gpu.name for s, _ in (point.before, point.after)]
    known = [prices.PRICES.get(name, {}).get(basis) for name in names]
    return None if None in known else known[1].value / known[0].value


def _spread(whole: Attribution, cheaper: dict[str, float]) -> str:
    low, high = (x / whole.gain for x in whole.intervals["gain"])
    least, most = min(cheaper.values()), max(cheaper.values())
    ends = f"{least * low:.2f} to {most * high:.2f}"
    return f"{least:.2f} to {most:.2f} times cheaper by price basis, {ends} with the gain's 80 % interval"


def _collapse(s: Setting) -> Claim:
    fp4 = math.log(s.whole.factors.get("fp4_bytes", 1) * s.whole.factors.get("fp4_flops", 1))
    share = fp4 / math.log(s.whole.gain) if s.whole.gain != 1 else 0.0
    cheaper = {b: s.whole.gain / r for b, r in price_ratios(s.point).items()}
    spread = _spread(s.whole, cheaper) if cheaper else ""
    if not cheaper:
        verdict = "not testable here"
    elif min(cheaper.values()) <= 1:
        verdict = "partly" if max(cheaper.values()) > 1 else "not supported"
    else:
        verdict = "supported" if share > 0.5 and min(cheaper.values()) >= 3 else "partly"
    return Claim(
        "fp4_collapse",
        "FP4 on B200 collapses the cost of serving MoE models against H100 and H200",
        "throughput at equal interactivity, split by cause, over the ratio of prices by basis",
        (
            (_shares(s.whole), "moelab plan"),
            (
                f"cost per token before over after, by price basis: {_by_basis(cheaper)}",
                "moelab plan, prices.py",
            ),
            *_measured(s, "h200 to b200"),
            *_measured(s, "fp8 to fp4"),
            _published("r1_b200_over_h200"),
            _published("qwen3_235b_b200_over_h200"),
        ),
        verdict,
        f"{s.whole.gain:.1f}x the throughput, of which FP4 is {100 * share:.0f} % of the logarithm; "
        + (f"tokens are {spread} " if cheaper else "no prices of both ")
        + "(supported: FP4 above half, and 3 times cheaper on every basis)",
        tuple(s.whole.factors.items()),
        "factor of the gain",
    )


def _thirty_five(s: Setting) -> Claim:
    low, high = (evidence.EVIDENCE[n].value for n in ("claim_35x_low", "claim_35x_high"))
    without = evidence.EVIDENCE["gb300_without_mtp"].value
    arithmetic = (prices.per_million(1.41, 90), prices.per_million(2.65, 6000))
    return Claim(
        "thirty_five_times",
        "GB300 serves DeepSeek-R1 35 times cheaper per token than H200",
        "the arithmetic of the point, and the same point without multi-token prediction",
        (
            _published("claim_35x_low"),
            _published("claim_35x_high"),
            _published("gb300_without_mtp"),
            (
                f"computed: 1.41 $/h at 90 tokens/s is {arithmetic[0]:.2f} $, "
                f"2.65 $/h at 6000 is {arithmetic[1]:.3f} $",
                "moelab plan, prices.py",
            ),
        ),
        "partly" if high / low > 30 and high / without < 10 else "not supported",
        f"the arithmetic holds ({high / low:.0f}x) at one interactivity with speculative decoding and owner's prices; "
        f"without it the ratio is {high / without:.1f}x, at 90 tokens/s/GPU of the older system",
        (("with MTP", high / low), ("without MTP", high / without)),
        "times cheaper, GB300 against H200",
    )


def _is_fp8_to_fp4(point: Point) -> bool:
    """Whether the measured pairs of FP8 and FP4 are about this point."""
    before, after = (recipes.named(precision) for _, precision in (point.before, point.after))
    return before.compute["experts"] == "fp8" and after.compute["experts"] == "fp4"


def _doubles(s: Setting) -> Claim:
    found = s.pairs.get("fp8 to fp4") if _is_fp8_to_fp4(s.point) else None
    number = found.median if found else s.equal.gain
    modelled = (("modelled", s.equal.gain),)
    bars = (*modelled, *((("measured", found.median),) if found else ()), ("claimed", 2.0))
    verdict = "supported" if number >= 1.8 else "partly" if number >= 1.5 else "not supported"
    return Claim(
        "fp4_doubles",
        "FP4 doubles throughput, as its peak FLOPs do",
        "time per output token of FP8 over FP4 on the same GPU, at equal layout and batch",
        ((_shares(s.equal), "moelab plan"), *_measured(s, "fp8 to fp4")),
        verdict,
        f"{number:.2f}x at equal configuration (supported from 1.8x, partly from 1.5x): decoding reads weights, and "
        "what is fixed per layer does not shrink with bits",
        bars,
        "speed-up",
    )


def _lossless(s: Setting) -> Claim:
    gaps = {g.precision: g for g in s.gaps}
    own = tuple(
        (
            f"{g.label}: {g.bits[0]:+.4f} [{g.bits[1]:+.4f}, {g.bits[2]:+.4f}] bits per byte of {g.reference:.3f}"
            + (
                ""
                if g.agreement is None
                else f", {100 * g.agreement:.1f} % of the tokens keep their experts"
            ),
            "moelab, experiments/baselines/quant.json: 4.4 M parameters, three seeds",
        )
        for g in s.gaps
    )
    joined = f"modelled gain from it: {_gain(s.fp4_alone)} tokens/s/GPU at {s.point.user:g} tokens/s/user"
    verdict, because = _quality_verdict(gaps.get("nvfp4_wa"))
    return Claim(
        "fp4_lossless",
        "FP4 loses nothing in quality",
        "moelab's own MoE in each format against float32 on the same documents; weights alone, weights and "
        "activations, and the key-value cache apart; beside what the format gains at one operating point",
        (
            *own,
            (joined, "moelab plan"),
            _published("mmlu_pro_moe"),
            _published("mmlu_pro_dense"),
            _published("aime_nemotron"),
        ),
        verdict,
        because,
        tuple((g.label, g.bits[0]) for g in s.gaps),
        "bits per byte more than float32",
    )


def _quality_verdict(gap: evidence.Gap | None) -> tuple[str, str]:
    """Judges NVFP4 with weights and activations: lossless if zero is inside, small below 0.1 % of the reference."""
    if gap is None:
        return "not testable here", "the study of moelab's own models is not beside the package"
    share = gap.bits[0] / gap.reference
    verdict = "supported" if gap.bits[1] <= 0 else "partly" if share < 0.001 else "not supported"
    clear = "with zero inside" if gap.bits[1] <= 0 else "clear of zero"
    return verdict, (
        f"NVFP4 weights and activations lose {100 * share:.2f} % in bits per byte, {clear} (partly below 0.1 %), at a "
        "scale that says little of frontier models; others' benchmarks lose 0.5 to 2.4 points"
    )


def _silicon(s: Setting) -> Claim:
    model = published.find(s.point.model)
    a = s.point.way(s.point.before[0], s.point.before[1])
    b = s.point.way(s.point.after[0], s.point.before[1])
    found = attribution.equal_configuration(model, a, b, Layout(8), 32)
    gpus = [hardware.system(system).gpu.name for system, _ in (s.point.before, s.point.after)]
    measured = s.pairs.get(" to ".join(gpus))  # of this pair of GPUs, or none
    number = measured.median if measured else found.gain
    cheaper = {b: number / r for b, r in price_ratios(s.point).items()}
    return Claim(
        "new_gpu",
        "A new GPU pays without a new format",
        "time per output token on the older over the newer GPU at equal precision, layout and batch, over the ratio of "
        "their prices",
        (
            (_shares(found), "moelab plan"),
            *_measured(s, "h200 to b200"),
            *_measured(s, "h100 to h200"),
            *_measured(s, "b200 to b300"),
            (
                f"price, newer over older: {_by_basis(price_ratios(s.point))}",
                "moelab plan, prices.py",
            ),
            (
                f"cost per token, older over newer: {_by_basis(cheaper)}",
                "moelab plan, prices.py",
            ),
        ),
        _pays(tuple(cheaper.values())),
        f"{number:.2f}x as fast ({'measured' if measured else 'modelled'}, {' to '.join(gpus)}); cost per token, older "
        f"over newer: {_by_basis(cheaper)} (supported: above 1 on every basis, partly: on some); larger batches at "
        "equal interactivity come on top",
        tuple((name, p.median) for name, p in s.pairs.items()) or (("modelled", found.gain),),
        "speed-up at equal configuration",
    )


def _pays(cheaper: tuple[float, ...]) -> str:
    if not cheaper:
        return "not testable here"
    if min(cheaper) > 1:
        return "supported"
    return "partly" if max(cheaper) > 1 else "not supported"


def _nvlink(s: Setting) -> Claim:
    model = published.find("deepseek_v3")
    load = Load(2048, 1024, disaggregated=True)
    rack = Way(hardware.system("gb200x72"), recipes.named("fp8"), load, s.point.years)
    gpu = dataclasses.replace(rack.system.gpu, domain=hardware.find("b200").domain, name="gb200")
    islands = dataclasses.replace(rack, system=hardware.System(gpu, 72))
    gains = {
        user: attribution.equal_interactivity(model, islands, rack, user) for user in (30, 60, 100)
    }
    times = [evidence.EVIDENCE[n].value for n in ("exchange_ib_ep32", "exchange_nvl72_ep64")]
    ratio, gain = times[0] / times[1], max(g.gain for g in gains.values())
    words = ", ".join(f"{_gain(g)} at {u} tokens/s/user" for u, g in gains.items())
    return Claim(
        "nvlink",
        "NVLink over a rack makes experts of trillion-parameter models practical",
        "the exchange between experts' ranks, and the best throughput of 72 GPUs in one NVLink domain against 9 "
        "islands of 8 joined by network cards",
        (
            _published("exchange_nvl72_ep64"),
            _published("exchange_ib_ep32"),
            (
                f"modelled, {model.name} in FP8, GB200 with 72 against 8 GPUs in a domain: {words}",
                "moelab plan",
            ),
            _published("gb200_over_b200_at_125"),
            _published("gb200_over_b200_at_164"),
            _published("v3_h800_node"),
        ),
        "supported" if ratio > 2 and gain > 1.2 else "partly",
        f"an exchange is {ratio:.1f} times faster and throughput up to {gain:.2f} times higher (supported from 2 and "
        "1.2); but DeepSeek serves 671B over InfiniBand, and at 164 tokens/s/user 8 GPUs were measured to be nearly as "
        "good: practical, not required",
        tuple((f"{u} tokens/s/user", g.gain) for u, g in gains.items()),
        "throughput, NVL72 over NVL8",
    )


def _trillions(s: Setting) -> Claim:
    rows, fits = [], {}
    for name in ("hypothetical_5t", "hypothetical_10t"):
        model = published.find(name)
        for system in ("gb200x72", "gb300x72"):
            way = Way(hardware.system(system), recipes.named("nvfp4"), Load(8192, 1024))
            size = model.weight_bytes(way.recipe)
            room = way.system.count * way.system.gpu.memory.value
            fits[name, system] = size / room
            options = search.Options(years=s.point.years)
            found = search.search(model, way.recipe, way.system, way.load, options)
            best = found.row(found.front()[0])
            rows.append(
                (
                    f"modelled, {name} in NVFP4 on {system}: {scaled(size, 'B')} of {scaled(room, 'B')}; fastest "
                    f"{best['user_tokens_per_s']:.0f} tokens/s/user, 80 % band {1e3 / best['tpot_ms_high']:.0f} to "
                    f"{1e3 / best['tpot_ms_low']:.0f} (outside the calibrated range)",
                    "moelab plan",
                )
            )
    return Claim(
        "trillions",
        "Models of 5 and 10 trillion parameters can be served from one rack",
        "bytes of weights against the memory, and the fastest configuration",
        tuple(rows),
        "partly" if all(x < 0.9 for x in fits.values()) else "not supported",
        "the weights fit in FP4 (10 T would not in bfloat16); speeds are extrapolated: the largest model of the "
        f"calibration has {calibration.shipped().ranges['parameters'][1] / 1e12:.1f} T",
        tuple((f"{n} {x}", v) for (n, x), v in fits.items()),
        "share of the rack's memory",
    )


def _clouds(s: Setting) -> Claim:
    fp4 = [i for i in clouds.INSTANCES if "fp4" in hardware.find(i.gpu).peaks]
    sure = sorted({i.cloud for i in fp4 if i.verified})
    missing = sorted({i.cloud for i in clouds.INSTANCES} - set(sure))
    words = _by_basis(price_ratios(s.point))
    return Claim(
        "clouds",
        "The large clouds sell it",
        "a dated list of machines with FP4 tensor cores, who says so, and what they cost against the older GPU",
        (
            *(_offer(i) for i in clouds.INSTANCES),
            (f"price of the newer over the older GPU: {words}", "moelab plan, prices.py"),
        ),
        "supported" if not missing else "partly" if sure else "not testable here",
        f"a source other than memory names such a machine at {', '.join(sure) or 'none of them'}"
        + (f", none at {', '.join(missing)}" if missing else "")
        + " (supported: at all three); offered is not on demand: AWS began with reserved blocks; whether it pays is "
        f"decided by the ratio of prices: {words}",
        tuple(price_ratios(s.point).items()),
        "price, newer over older GPU",
    )


def _offer(i: clouds.Instance) -> tuple[str, str]:
    mark = "" if i.verified else " (unverified)"
    price, source = "", f"{i.source.text}, {i.source.date} ({i.source.status})"
    if i.price is not None:
        price = f", {i.price}"
        source += f"; price: {i.price.source.text}, {i.price.source.date}"
    return f"{i.cloud} {i.name}: {i.gpu}{price}{mark}", source


def _verification(s: Setting) -> Claim:
    return Claim(
        "verification",
        "Nobody verifies this independently",
        "who publishes measurements, recipes and audits",
        (
            (
                "InferenceX measures nightly with open recipes since October 2025",
                "inferencex.semianalysis.com, 2026",
            ),
            ("MLPerf Inference is audited", "MLCommons, v5.1 2025-09 and v6.0 2026-04"),
            ("ure.us publishes quality of FP4 with pinned runs", "ure.us, 2026"),
        ),
        "not supported",
        "independent measurements exist; quality and cost at one operating point together were not found, hence this "
        "report",
    )


def _data(s: Setting) -> Claim:
    return Claim(
        "better_data",
        "Cheaper inference moves the effort to better data",
        "none: it is about what people do",
        (),
        "not testable here",
        "no measurement of hardware or models tells it",
    )


TESTS: tuple[Callable[[Setting], Claim], ...] = (
    _collapse,
    _thirty_five,
    _doubles,
    _lossless,
    _silicon,
    _nvlink,
    _trillions,
    _clouds,
    _verification,
    _data,
)
