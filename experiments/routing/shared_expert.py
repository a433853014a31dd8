"""DeepSeekMoE: one shared expert beside one routed of twice as many (arXiv:2401.06066).

    moelab run --config=experiments/routing/shared_expert.py --workdir=runs/shared_expert

Equal active parameters: the shared expert and one routed one.

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
    config.moe = dict(num_shared_experts=1)
    config.router = dict(kind="top_k", k=1, renormalise=False)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
