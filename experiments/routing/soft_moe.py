"""Soft MoE: experts work on mixtures of a sequence's tokens (arXiv:2308.00951).

    moelab run --config=experiments/routing/soft_moe.py --workdir=runs/soft_moe

Not causal: every slot mixes the whole sequence, so its loss is not comparable. 16 slots per expert for 128 tokens:
expert evaluations per token as with k = 2.

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
    config.moe = dict(slots_per_expert=16)
    config.router = dict(kind="top_k", k=2)
    return config
