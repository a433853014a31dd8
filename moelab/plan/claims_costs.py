"""Claims that prices decide: what FP4 and a new GPU save, and who sells them."""

from __future__ import annotations

import math

from moelab.plan import attribution, clouds, hardware, prices, published
from moelab.plan.attribution import Attribution
from moelab.plan.claim import (
    Claim,
    Point,
    Setting,
    measured_lines,
    published_line,
    shares_words,
)
from moelab.plan.work import Layout

EVERYWHERE = tuple(basis for basis in prices.BASES if basis != "low")  # offers that all can have


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


def collapse(s: Setting) -> Claim:
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
            (shares_words(s.whole), "moelab plan"),
            (
                f"cost per token before over after, by price basis: {_by_basis(cheaper)}",
                "moelab plan, prices.py",
            ),
            *measured_lines(s, "h200 to b200"),
            *measured_lines(s, "fp8 to fp4"),
            published_line("r1_b200_over_h200"),
            published_line("qwen3_235b_b200_over_h200"),
        ),
        verdict,
        f"{s.whole.gain:.1f}x the throughput, of which FP4 is {100 * share:.0f} % of the logarithm; "
        + (f"tokens are {spread} " if cheaper else "no prices of both ")
        + "(supported: FP4 above half, and 3 times cheaper on every basis)",
        tuple(s.whole.factors.items()),
        "factor of the gain",
    )


def silicon(s: Setting) -> Claim:
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
            (shares_words(found), "moelab plan"),
            *measured_lines(s, "h200 to b200"),
            *measured_lines(s, "h100 to h200"),
            *measured_lines(s, "b200 to b300"),
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


def sold_by_clouds(s: Setting) -> Claim:
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
