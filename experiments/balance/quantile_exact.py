"""Quantile balancing, exact over the batch, no memory (J. Su, kexue.fm, article 11619).

    moelab run --config=experiments/balance/quantile_exact.py --workdir=runs/quantile_exact

Rate 1.

Lab book
  machine    2 cores of an AMD EPYC (AVX2), 24 GiB, jax 0.12.0.1
  wall time  see experiments/README.md
  result     see experiments/README.md, which is generated from the result cards
  date       2026-11-23, schema 1
"""

import ml_collections

BASE = "../ablation.py"


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.router = dict(kind="top_k", k=2, score="sigmoid")
    config.balance = dict(quantile_bias=dict(rate=1.0))
    return config
