"""OLMoE: softmax before selection, weights not renormalised, load and z-loss (arXiv:2409.02060).

    moelab run --config=experiments/routing/olmoe.py --workdir=runs/olmoe

The coefficients are the paper's, in our convention (1 at balance).

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
    config.router = dict(kind="top_k", k=2, renormalise=False)
    config.balance = dict(switch_loss=dict(coefficient=0.01), z_loss=dict(coefficient=0.001))
    return config
