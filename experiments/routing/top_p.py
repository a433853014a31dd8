"""Dynamic routing: as many experts as reach a probability of 0.4, with the entropy loss (arXiv:2403.07652).

    moelab run --config=experiments/routing/top_p.py --workdir=runs/top_p

The number of experts per token is learned, so that active parameters differ from the others'.

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
    config.router = dict(kind="top_p", k=2, max_experts=8)
    config.balance = dict(switch_loss=dict(coefficient=0.01), entropy_loss=dict(coefficient=0.01))
    return config
