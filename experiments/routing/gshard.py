"""GShard: top 2 with a random second expert, capacity 2, loss on first choices (arXiv:2006.16668).

    moelab run --config=experiments/routing/gshard.py --workdir=runs/gshard

The second expert is used with probability min(1, 2 g2) in training.

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
    config.router = dict(kind="gshard")
    config.balance = dict(switch_loss=dict(coefficient=0.01, first_choice_only=True))
    return config
