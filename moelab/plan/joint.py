"""Quality beside cost at one point: what a format loses in moelab's study, and what the planner says it gains."""

from __future__ import annotations

from moelab.plan import hardware, prices, published, recipes, search
from moelab.plan.claim import Setting
from moelab.plan.serving import Load


def rows(shared: Setting) -> list[dict]:
    """Joins quality to cost: what each format loses in moelab's study beside what it gains at the operating point.

    Returns:
      one dict per format: precision, loss in bits per byte with its interval, modelled gain over FP8, and $ per million
      output tokens by price basis.
    """
    point, found = shared.point, []
    model, system = published.find(point.model), hardware.system(point.after[0])
    recipe_of = {
        "fp8_wa": "fp8",
        "nvfp4_w": "nvfp4_w4a16",
        "nvfp4_wa": "nvfp4",
        "mxfp4_w": "mxfp4_w4a16",
        "mxfp4_wa": "mxfp4",
    }
    best = {}
    for name in recipe_of.values():
        load, options = Load(point.isl, point.osl), search.Options(years=point.years)
        searched = search.search(model, recipes.named(name), system, load, options)
        row = searched.at_speed(point.user)
        best[name] = float(searched.throughput[row]) if row is not None else float("nan")
    for gap in shared.gaps:
        if gap.precision not in recipe_of:
            continue
        throughput = best[recipe_of[gap.precision]]
        costs = {
            basis: prices.per_million(figure.value, throughput)
            for basis, figure in prices.PRICES.get(system.gpu.name, {}).items()
        }
        found.append(
            {
                "precision": gap.precision,
                "label": gap.label,
                "bits_per_byte": gap.bits[0],
                "low": gap.bits[1],
                "high": gap.bits[2],
                "tokens_per_s_gpu": throughput,
                "gain_over_fp8": throughput / best["fp8"],
                "dollars_per_million": costs,
            }
        )
    return found
