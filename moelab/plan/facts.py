"""Lists the constants of the planner with their sources, for `moelab plan facts`."""

from __future__ import annotations

from moelab.plan import calibrate, calibration, clouds, hardware, prices, published, recipes
from moelab.plan.figures import Figure, scaled


def rows(what: str) -> tuple[tuple[str, ...], list[tuple]]:
    """Returns (columns, rows) of gpus, models, recipes, prices, clouds or calibration."""
    return {
        "gpus": gpus,
        "models": models,
        "recipes": formats,
        "prices": costs,
        "clouds": instances,
        "calibration": calibrated,
    }[what]()


def _sourced(figure: Figure) -> tuple[str, ...]:
    others = "; ".join(f"{scaled(v, figure.unit)}: {why}" for v, why in figure.others) or "-"
    source = figure.source
    return str(figure), f"{source.text}, {source.date} ({source.status})", others


def gpus() -> tuple[tuple[str, ...], list[tuple]]:
    """Lists every figure of every GPU."""
    found = [
        (name, field, *_sourced(figure))
        for name, gpu in hardware.GPUS.items()
        for field, figure in gpu.figures().items()
    ]
    return ("GPU", "figure", "value", "source", "contradictory values"), found


def models() -> tuple[tuple[str, ...], list[tuple]]:
    """Lists shapes and counts of the models."""
    bf16 = recipes.named("bf16")
    found = []
    for name, m in published.MODELS.items():
        source = m.published or m.source
        found.append(
            (
                name,
                f"{m.total() / 1e9:.2f} B",
                f"{m.active() / 1e9:.2f} B",
                *(scaled(m.weight_bytes(recipes.named(r)), "B") for r in ("bf16", "fp8", "nvfp4")),
                f"{m.kv_bytes_per_token(bf16) / 1024:.4g} KiB",
                f"{m.forward_flops(4096) / 1e9:.4g} GFLOP",
                f"{source.text}, {source.date}",
            )
        )
    columns = ("model", "total", "active", "bf16", "fp8", "nvfp4", "KV/token", "forward at 4096")
    return (*columns, "source"), found


def formats() -> tuple[tuple[str, ...], list[tuple]]:
    """Lists the recipes."""
    found = [
        (
            name,
            r.formats["experts"],
            f"{r.bits['experts']:.4g}",
            r.compute["experts"],
            r.formats["attention"],
        )
        for name, r in recipes.RECIPES.items()
    ]
    columns = (
        "recipe",
        "experts stored",
        "bits",
        "experts computed",
        "attention and dense",
        "about",
    )
    return columns, [(*row, recipes.ABOUT[row[0]]) for row in found]


def costs() -> tuple[tuple[str, ...], list[tuple]]:
    """Lists prices by GPU and basis."""
    found = [
        (gpu, basis, *_sourced(figure), prices.ABOUT[basis])
        for gpu, table in prices.PRICES.items()
        for basis, figure in table.items()
    ]
    return ("GPU", "basis", "price", "source", "other prices", "basis means"), found


def instances() -> tuple[tuple[str, ...], list[tuple]]:
    """Lists the machines of the clouds, and prices where they are known by cloud."""
    found = []
    for i in clouds.INSTANCES:
        price = _sourced(i.price)[:2] if i.price else ("not known here", "-")
        where = f"{i.source.text}, {i.source.date} ({i.source.status})"
        found.append((i.cloud, i.name, i.gpu, where, *price))
    return ("cloud", "machine", "GPU", "source", "price", "source of the price"), found


def calibrated() -> tuple[tuple[str, ...], list[tuple]]:
    """Lists the calibrated values with their intervals and priors."""
    shipped = calibration.shipped()
    found = [
        (
            p.name,
            f"{shipped.values[p.name]:.4g}",
            "{:.3g} to {:.3g}".format(*shipped.intervals[p.name]),
            f"{p.prior:.3g}",
            p.about,
        )
        for p in calibrate.PARAMETERS
    ]
    found.append(
        (
            "skew",
            f"{shipped.skew:g}",
            "-",
            "-",
            "exponent of the experts' loads, chosen from a list",
        )
    )
    return ("value", "calibrated", "80 % interval", "prior", "about"), found
