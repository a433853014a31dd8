"""DeepSeek-V3: experts from the best 2 of 4 groups by the sum of their top two (arXiv:2412.19437).

    moelab run --config=experiments/routing/group_limited_sum.py --workdir=runs/group_limited_sum

Sigmoid scores with a loss-free bias.

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
    config.router = dict(kind="group_limited", k=2, num_groups=4, groups_per_token=2)
    config.balance = dict(loss_free_bias=dict(rate=0.01))
    return config
