"""A capacity of 1 times the mean load, with the Switch loss.

    moelab run --config=experiments/balance/capacity_100.py --workdir=runs/capacity_100

Dropped tokens pass by the experts; compare the dropped share and the loss. Leaks by k = 2.

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
    config.moe = dict(capacity_factor=1.0)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
