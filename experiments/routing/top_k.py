"""Token choice: softmax over the experts, top 2, weights divided by their sum; Switch loss.

    moelab run --config=experiments/routing/top_k.py --workdir=runs/top_k

The reference of this folder: Mixtral's weights (arXiv:2401.04088) with the loss of arXiv:2101.03961 for k = 2.

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
    config.router = dict(kind="top_k", k=2)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
