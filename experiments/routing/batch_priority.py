"""Batch prioritised routing: under a capacity of 1 the most certain tokens keep their place (arXiv:2106.05974).

    moelab run --config=experiments/routing/batch_priority.py --workdir=runs/batch_priority

Not causal: a token's place depends on later tokens, so its loss is not comparable.

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
    config.moe = dict(capacity_factor=1.0)
    config.router = dict(kind="batch_priority", k=2, renormalise=False)
    config.balance = dict(importance_loss=dict(coefficient=0.005))
    return config
