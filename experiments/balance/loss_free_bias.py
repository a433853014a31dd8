"""Loss-free balancing by the sign of the load error (arXiv:2408.15664).

    moelab run --config=experiments/balance/loss_free_bias.py --workdir=runs/loss_free_bias

Rate 0.01: at the paper's 0.001, 150 steps move a bias by 0.15 at most.

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
    config.balance = dict(loss_free_bias=dict(rate=0.01))
    return config
