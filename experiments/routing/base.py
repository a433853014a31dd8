"""BASE layers: a linear assignment balances the training batch (arXiv:2103.16716).

    moelab run --config=experiments/routing/base.py --workdir=runs/base

Experts of twice the width, half as many. Not causal in training; greedy in evaluation.

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
    config.moe = dict(num_experts=8, expert_width=256)
    config.router = dict(kind="base", max_iterations=200)
    return config
