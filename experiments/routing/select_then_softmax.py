"""Token choice: the softmax runs over the selected logits only (gpt-oss, ST-MoE's ablation).

    moelab run --config=experiments/routing/select_then_softmax.py --workdir=runs/select_then_softmax

Equal to `top_k` in its forward pass; here to be checked in kind.

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
    config.router = dict(kind="top_k", k=2, score_before_selection=False, renormalise=False)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
