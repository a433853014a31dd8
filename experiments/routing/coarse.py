"""Coarse experts: 8 of twice the width, 1 per token.

    moelab run --config=experiments/routing/coarse.py --workdir=runs/coarse

Equal active and total parameters; with `fine_grained` the series of granularity.

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
    config.router = dict(kind="top_k", k=1, renormalise=False)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
