"""MoE++: zero, copy and constant experts beside the feed-forward ones (arXiv:2410.07348).

    moelab run --config=experiments/routing/zero_computation.py --workdir=runs/zero_computation

Tokens may skip computation, so that active parameters are fewer than the others'.

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
    config.router = dict(kind="zero_computation", k=2, num_zero=1, num_copy=1, num_constant=2)
    config.balance = dict(heterogeneous_loss=dict(coefficient=0.01))
    return config
