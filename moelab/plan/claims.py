"""The claims about 4-bit experts, NVLink and new GPUs: each with its test, its evidence and the verdict that follows.

Verdicts are rules over the numbers where there are numbers: whoever changes the point or the calibration gets the
verdicts of that. The operating point is one for all claims, and printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moelab.plan import (
    attribution,
    calibration,
    claims_costs,
    evidence,
    hardware,
    prices,
    published,
    recipes,
    search,
)
from moelab.plan.attribution import Way
from moelab.plan.claim import (
    Claim,
    Point,
    Setting,
    gain_words,
    measured_lines,
    published_line,
    setting,
    shares_words,
)
from moelab.plan.figures import scaled
from moelab.plan.serving import Load


def report(point: Point | None = None) -> tuple[Setting, tuple[Claim, ...]]:
    """Tests every claim."""
    shared = setting(point or Point())
    return shared, tuple(test(shared) for test in TESTS)


def _thirty_five(s: Setting) -> Claim:
    low, high = (evidence.EVIDENCE[n].value for n in ("claim_35x_low", "claim_35x_high"))
    without = evidence.EVIDENCE["gb300_without_mtp"].value
    arithmetic = (prices.per_million(1.41, 90), prices.per_million(2.65, 6000))
    return Claim(
        "thirty_five_times",
        "GB300 serves DeepSeek-R1 35 times cheaper per token than H200",
        "the arithmetic of the point, and the same point without multi-token prediction",
        (
            published_line("claim_35x_low"),
            published_line("claim_35x_high"),
            published_line("gb300_without_mtp"),
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
        ((shares_words(s.equal), "moelab plan"), *measured_lines(s, "fp8 to fp4")),
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
    joined = f"modelled gain from it: {gain_words(s.fp4_alone)} tokens/s/GPU at {s.point.user:g} tokens/s/user"
    verdict, because = _quality_verdict(gaps.get("nvfp4_wa"))
    return Claim(
        "fp4_lossless",
        "FP4 loses nothing in quality",
        "moelab's own MoE in each format against float32 on the same documents; weights alone, weights and "
        "activations, and the key-value cache apart; beside what the format gains at one operating point",
        (
            *own,
            (joined, "moelab plan"),
            published_line("mmlu_pro_moe"),
            published_line("mmlu_pro_dense"),
            published_line("aime_nemotron"),
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
    words = ", ".join(f"{gain_words(g)} at {u} tokens/s/user" for u, g in gains.items())
    return Claim(
        "nvlink",
        "NVLink over a rack makes experts of trillion-parameter models practical",
        "the exchange between experts' ranks, and the best throughput of 72 GPUs in one NVLink domain against 9 "
        "islands of 8 joined by network cards",
        (
            published_line("exchange_nvl72_ep64"),
            published_line("exchange_ib_ep32"),
            (
                f"modelled, {model.name} in FP8, GB200 with 72 against 8 GPUs in a domain: {words}",
                "moelab plan",
            ),
            published_line("gb200_over_b200_at_125"),
            published_line("gb200_over_b200_at_164"),
            published_line("v3_h800_node"),
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
    claims_costs.collapse,
    _thirty_five,
    _doubles,
    _lossless,
    claims_costs.silicon,
    _nvlink,
    _trillions,
    claims_costs.sold_by_clouds,
    _verification,
    _data,
)
