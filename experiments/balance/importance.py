"""The importance loss: equal sums of combine weights (arXiv:1701.06538).

    moelab run --config=experiments/balance/importance.py --workdir=runs/importance

Coefficient 0.1.

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
    config.balance = dict(importance_loss=dict(coefficient=0.1))
    return config
