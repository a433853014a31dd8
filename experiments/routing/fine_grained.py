"""Fine-grained experts: 32 of half the width, 4 per token (arXiv:2401.06066).

    moelab run --config=experiments/routing/fine_grained.py --workdir=runs/fine_grained

Equal active and total parameters; with `coarse` the series of granularity.

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
    config.moe = dict(num_experts=32, expert_width=64)
    config.router = dict(kind="top_k", k=4)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
