"""The time of a step: max(compute, memory) of every operation, links, and what is fixed per layer and step.

    t = sum_o max(F_o / (phi_q P_q), B_o / (mu_c W)) + N / (lambda V) + collectives t_c + layers t_l + t_s

P_q peak of precision q, W memory bandwidth, V link bandwidth; phi, mu, lambda the efficiencies and t_c, t_l, t_s the
latencies that `calibrate` finds. All arrays broadcast: a row is one configuration. O operations, n rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

PRECISIONS = ("bf16", "fp8", "fp4")
OPERATIONS = ("attention", "core", "dense", "experts", "head")
MEMORY = (
    "bf16",
    "fp8",
    "fp4",
    "keys",
)  # classes of what is read: weights by width, keys and values
LINKS = ("nvlink", "nic")
ENGINES = ("trtllm", "sglang", "vllm")


@dataclasses.dataclass(frozen=True)
class Terms:
    """What one GPU does in a step, as seconds at full speed.

    Attributes:
      compute_On: FLOPs over the peak.
      memory_On: bytes over the bandwidth.
      precision_On: index into PRECISIONS.
      memory_class_On: index into MEMORY.
      link_Ln: bytes over the link, by LINKS.
      collectives_n: number of collective operations.
      layers_n: number of layers.
      steps_n: number of steps (launches of the whole model), usually 1.
    """

    compute_On: np.ndarray
    memory_On: np.ndarray
    precision_On: np.ndarray
    memory_class_On: np.ndarray
    link_Ln: np.ndarray
    collectives_n: np.ndarray
    layers_n: np.ndarray
    steps_n: np.ndarray

    def scaled(self, factor) -> Terms:
        """Returns the terms of `factor` times the work, launches included."""
        changed = {
            name: getattr(self, name) * factor
            for name in (
                "compute_On",
                "memory_On",
                "link_Ln",
                "collectives_n",
                "layers_n",
                "steps_n",
            )
        }
        return dataclasses.replace(self, **changed)


def concatenate(terms: list[Terms]) -> Terms:
    """Puts rows behind each other."""
    return Terms(
        *(
            np.concatenate([getattr(t, field.name) for t in terms], axis=-1)
            for field in dataclasses.fields(Terms)
        )
    )


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Calibrated values: shares of the peak, and seconds.

    Attributes:
      compute: share of the dense peak, by PRECISIONS.
      memory: share of the bandwidth, by MEMORY.
      link: share of the link, by LINKS.
      layer: seconds per layer, by ENGINES.
      collective: seconds per collective operation.
      step: seconds per step.
      mixing: how much a prompt token costs a decoding batch, over its own compute time.
      drift: how much a year of software lowers the fixed latencies: exp(-drift * years after 2026-01-01).
    """

    compute: tuple[float, float, float]
    memory: tuple[float, float, float, float]
    link: tuple[float, float]
    layer: tuple[float, float, float]
    collective: float
    step: float
    mixing: float = 1.0
    drift: float = 0.0


PEAK = Efficiency(
    (1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0, 0), 0, 0
)  # no overhead: the plain roofline


def operations(terms: Terms, efficiency: Efficiency) -> np.ndarray:
    """Returns seconds of each operation, (O, n)."""
    compute = terms.compute_On / np.asarray(efficiency.compute)[terms.precision_On]
    memory = terms.memory_On / np.asarray(efficiency.memory)[terms.memory_class_On]
    return np.maximum(compute, memory)


def links(terms: Terms, efficiency: Efficiency) -> np.ndarray:
    """Returns seconds in which bytes are on the links, (n,)."""
    return (terms.link_Ln / np.asarray(efficiency.link)[:, None]).sum(0)


def fixed(terms: Terms, efficiency: Efficiency, engine=0, years=0.0) -> np.ndarray:
    """Returns seconds that do not depend on the batch, (n,).

    Args:
      engine: index into ENGINES, one or one per row.
      years: of the software after 2026-01-01.
    """
    latency = np.asarray(efficiency.layer)[engine] * terms.layers_n
    latency = (
        latency + terms.collectives_n * efficiency.collective + terms.steps_n * efficiency.step
    )
    return latency * np.exp(-efficiency.drift * np.asarray(years, float))


def time(
    terms: Terms, efficiency: Efficiency, engine=0, years=0.0, overlap: str = "none"
) -> np.ndarray:
    """Returns seconds of the step, (n,).

    Args:
      overlap: "none": links wait for operations; "two_batch": two half batches alternate, the links of one under the
        operations of the other, and each half reads the weights.
    """
    parts = operations(terms, efficiency)
    wire = links(terms, efficiency)
    if overlap == "two_batch":
        again = np.maximum(
            terms.compute_On / np.asarray(efficiency.compute)[terms.precision_On],
            2 * terms.memory_On / np.asarray(efficiency.memory)[terms.memory_class_On],
        )
        keys = OPERATIONS.index("core")
        again[keys] = parts[keys]  # a half reads its own keys only
        # Whoever does not gain by it leaves it off.
        both = np.minimum(np.maximum(again.sum(0), wire), parts.sum(0) + wire)
        return both + fixed(terms, efficiency, engine, years)
    return parts.sum(0) + wire + fixed(terms, efficiency, engine, years)
