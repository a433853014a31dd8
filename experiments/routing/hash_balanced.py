"""Hash layers: a table that balances the frequencies of the training data (arXiv:2106.04426).

    moelab run --config=experiments/routing/hash_balanced.py --workdir=runs/hash_balanced

Experts of twice the width, half as many. Nothing is learned in the choice.

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
    config.router = dict(kind="hash", k=1, table="balanced")
    return config
