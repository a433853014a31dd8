"""What a GPU costs per hour, dated and sourced, and what follows: dollars and joules per token, break-even ratios.

A price without its basis means nothing: owner's cost, a neocloud's hour and a hyperscaler's list differ by three to
seven for the same GPU. So every cost is printed with the basis, the source and the date.
"""

from __future__ import annotations

from moelab import spelling
from moelab.errors import UserError
from moelab.plan.figures import Figure, Source

BASES = ("owner", "low", "neocloud", "blended", "hyperscaler", "aws", "azure", "google")
ABOUT = {
    "owner": "total cost of ownership, as SemiAnalysis estimates it",
    "low": "spot and the cheapest offers seen",
    "neocloud": "on demand or reserved at CoreWeave, Lambda, Nebius, Crusoe and the like",
    "blended": "average of North American offers, neoclouds and hyperscalers together",
    "hyperscaler": "upper end of the list prices of AWS, Azure and Google Cloud",
    "aws": "list price of Amazon Web Services",
    "azure": "list price of Microsoft Azure",
    "google": "list price of Google Cloud",
}
_UNIT = "$/GPU-hour"


def _source(text: str, date: str, status: str = "third party") -> Source:
    return Source(text, date, status)


_TCO = _source("SemiAnalysis InferenceX blogs", "2026")
_TCO_COMPUTED = _source("back-computed from InferenceX's $ per million tokens", "2026", "computed")
_COMPUX = _source("compux 2026 price index", "2026-03")
_AIMULTIPLE = _source("aimultiple, GPU prices of clouds", "2026-05")
_MERCATUS = _source("mercatus-ai.com, GPU prices of clouds by tier", "2026-05")
_DEPLOYBASE = _source("deploybase.ai, Azure against Google Cloud, with AWS beside them", "2026")
_PACKET = _source("packet.ai, GPU prices and pricing models", "2026-06")
_SPHERON = _source("spheron.network, H200, B200 and GB200", "2026-03-17")
_LYCEUM = _source("lyceum.technology, B200 prices", "2026-03-11")
_SIGNWL = _source("signwl, GPU prices", "2026-04")


def _usd(value: float, source: Source, *others: tuple[float, str]) -> Figure:
    return Figure(value, _UNIT, source, others)


_BLOCKS_H100 = (4.916, "AWS Capacity Blocks, 2024-12")
_BLOCKS_H200 = (5.408, "AWS Capacity Blocks, 2024-12")
PRICES: dict[str, dict[str, Figure]] = {
    "h100": {
        "owner": _usd(1.31, _TCO_COMPUTED),
        "low": _usd(1.47, _AIMULTIPLE, (1.99, "another low offer")),
        "neocloud": _usd(2.35, _COMPUX, (2.95, "median of posted prices, aimultiple 2026-05")),
        "hyperscaler": _usd(
            6.88, _DEPLOYBASE, (3.5, "lowest, mercatus 2026-05"), (5.0, "highest, mercatus 2026-05")
        ),
        "aws": _usd(
            6.88,
            _DEPLOYBASE,
            (12.29, "98.32 for 8, deploybase's page on AWS, 2026-03"),
            _BLOCKS_H100,
        ),
        "azure": _usd(11.06, _DEPLOYBASE, (6.98, "H100 NVL, one GPU to a machine")),
        "google": _usd(11.06, _DEPLOYBASE),
    },
    "h200": {
        "owner": _usd(1.41, _TCO),
        "low": _usd(2.25, _PACKET),
        "neocloud": _usd(3.5, _MERCATUS, (2.5, "lowest"), (4.54, "on demand, spheron 2026-03")),
        "hyperscaler": _usd(7.0, _MERCATUS, (4.5, "lowest"), _BLOCKS_H200),
        "aws": _usd(8.0, _PACKET, _BLOCKS_H200),
    },
    "b200": {
        "owner": _usd(1.95, _TCO),
        "low": _usd(2.25, _LYCEUM, (2.65, "reserved"), (3.75, "on demand, packet.ai 2026-06")),
        "neocloud": _usd(4.5, _LYCEUM, (6.0, "highest"), (6.03, "on demand, spheron 2026-03")),
        "blended": _usd(7.52, _SIGNWL),
        "hyperscaler": _usd(14.24, _SIGNWL),
        "aws": _usd(14.24, _PACKET),
    },
    "gb200": {
        "owner": _usd(2.21, _TCO),
        "low": _usd(4.54, _SPHERON, (9.08, "per superchip of two GPUs")),
        "blended": _usd(12.47, _SIGNWL),
    },
    "gb300": {"owner": _usd(2.65, _TCO), "blended": _usd(12.32, _SIGNWL)},
    "b300": {"blended": _usd(10.31, _SIGNWL)},
    "rtx_pro_6000": {
        "low": _usd(0.54, _SIGNWL, (0.66, "packet.ai 2026-06")),
    },
}

# Wall power of one GPU's share of a server over what the GPU is sold with: MLPerf Inference v5.1 measured 9.89 and
# 10.4 kW for 8 x B200 of 1 kW (Lenovo).
WALL = Figure(
    1.25,
    "of the GPU's power",
    Source("MLPerf Inference v5.1, power of an 8 x B200 server under load", "2025-09", "measured"),
    ((1.24, "Llama-405B offline: 9.89 kW"), (1.30, "Llama2-70B: 10.4 kW")),
)
PUE = Figure(1.25, "of the server's power", Source("an assumption", "2026-11", "assumed"))


class PriceError(UserError):
    """A price that is not known; the message says what can be given instead."""


def find(gpu: str, basis: str) -> Figure:
    """Returns dollars per GPU-hour.

    Args:
      gpu: its name.
      basis: one of BASES, or a number of dollars.

    Raises:
      PriceError: no such basis, or none known for the GPU.
    """
    try:
        value = float(basis)
    except ValueError:
        value = None
    if value is not None:
        if not 0 < value < 1e6:
            raise PriceError(f"a price wants dollars per GPU-hour above 0, got {basis}")
        return Figure(value, _UNIT, Source("given by the user", "2026", "assumed"))
    if basis not in BASES:
        hint = spelling.hint(basis, BASES) or f"; there are {', '.join(BASES)}, or a number"
        raise PriceError(f"no price basis {basis!r}{hint}")
    known = PRICES.get(gpu, {})
    if basis not in known:
        others = f"known are {', '.join(known)}" if known else "none is known"
        raise PriceError(f"no {basis} price of {gpu}; {others}; give dollars per GPU-hour instead")
    return known[basis]


def per_million(price: float, tokens_per_second: float, utilisation: float = 1.0) -> float:
    """Returns dollars per million tokens.

    Args:
      price: dollars per GPU-hour.
      tokens_per_second: of one GPU.
      utilisation: share of the time in which the GPUs serve.

    >>> round(per_million(2.65, 6000), 3), round(per_million(1.41, 90), 2)  # the "35x" claim's two ends
    (0.123, 4.35)
    """
    return price / 3600 / tokens_per_second * 1e6 / utilisation


def joules(power: float, tokens_per_second: float) -> float:
    """Returns joules per token at the wall, cooling included.

    Args:
      power: of the GPU as it is sold, W.
    """
    return power * WALL.value * PUE.value / tokens_per_second


def break_even(throughput_a: float, throughput_b: float) -> float:
    """Returns how many times the price of b's GPU-hour a's may be before a's tokens are dearer."""
    return throughput_a / throughput_b
