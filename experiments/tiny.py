"""A model small enough to try every command in seconds; its numbers mean nothing.

    moelab run --config=experiments/tiny.py --workdir=runs/tiny

Lab book
  machine    not measured
  wall time  not measured
  result     not measured; this run is for trying things out
  date       not measured
"""

import ml_collections

PRESETS = {
    "": {"router": {"kind": "top_k", "k": 2}},
    "expert_choice": {"router": {"kind": "expert_choice", "k": 2}},  # sees the future: not causal
    "sigmoid": {  # DeepSeek-V3's routing: sigmoid scores, a bias instead of a loss
        "router": {"kind": "top_k", "k": 2, "score": "sigmoid", "renormalise": True},
        "balance": {"loss_free_bias": {"rate": 0.001}},
    },
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    """Returns the fields that differ from the defaults of moelab/schema.py."""
    config = ml_collections.ConfigDict()
    config.model = dict(num_layers=2, width=64, num_heads=2, num_kv_heads=1, head_dim=32)
    config.moe = dict(num_experts=4, expert_width=64)
    config.optimizer = dict(kind="adamw", learning_rate=3e-3)
    config.schedule = dict(kind="warmup_cosine", warmup_steps=2)
    config.train = dict(num_steps=20, batch_size=4, length=64)
    config.tokenizer = dict(kind="byte")
    config.evaluation = dict(tokens_per_domain=1024, batch_size=4)
    config.checkpoint = dict(every=10)
    config.update(PRESETS[preset])
    return config
