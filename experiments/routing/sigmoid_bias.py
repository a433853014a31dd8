"""DeepSeek-V3: sigmoid scores, loss-free bias, a light sequence-wise loss (arXiv:2412.19437).

    moelab run --config=experiments/routing/sigmoid_bias.py --workdir=runs/sigmoid_bias

One group. The bias moves ten times as fast as in the paper: 150 steps at 0.001 move it by 0.15 at most.

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
    config.router = dict(kind="top_k", k=2, score="sigmoid")
    config.balance = dict(
        loss_free_bias=dict(rate=0.01), switch_loss=dict(coefficient=0.0001, scope="sequence")
    )
    return config
