"""Sinkhorn routing as in Megatron-LM (arXiv:2202.01169).

    moelab run --config=experiments/routing/sinkhorn.py --workdir=runs/sinkhorn

Not causal in training; raw logits select in evaluation.

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
    config.router = dict(kind="sinkhorn", k=2)
    return config
