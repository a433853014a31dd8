"""Switch: the best expert alone, a capacity of 1.25, input jitter (arXiv:2101.03961).

    moelab run --config=experiments/routing/switch.py --workdir=runs/switch

Experts of twice the width, half as many: equal active and total parameters.

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
    config.moe = dict(num_experts=8, expert_width=256, capacity_factor=1.25)
    config.router = dict(kind="top_k", k=1, renormalise=False, input_jitter=0.01)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
