"""ReMoE: ReLU gates and an adaptive L1 penalty (arXiv:2412.14711).

    moelab run --config=experiments/routing/remoe.py --workdir=runs/remoe

The coefficient starts at 1e-5 instead of 1e-8: 150 steps are short for a growth of 1.2 per step. Watch the open gates
go through their stages in the load of the report.

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
    config.router = dict(kind="remoe", k=2)
    config.balance = dict(relu_l1=dict(coefficient=1e-5))
    return config
