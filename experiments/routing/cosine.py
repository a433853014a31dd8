"""Cosine router in a low-dimensional space (X-MoE, arXiv:2204.09179).

    moelab run --config=experiments/routing/cosine.py --workdir=runs/cosine

A projection of 8, half the number of experts.

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
    config.router = dict(kind="cosine", k=2, projection=8)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
