"""Token choice with the square root of softplus as its score, and a selection bias (DeepSeek-V4's gate).

    moelab run --config=experiments/routing/sqrt_softplus.py --workdir=runs/sqrt_softplus

As MaxText has it; the weights are renormalised.

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
    config.router = dict(kind="top_k", k=2, score="sqrt_softplus")
    config.balance = dict(loss_free_bias=dict(rate=0.01))
    return config
