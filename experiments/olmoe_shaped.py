"""OLMoE's proportions at a laptop's size (arXiv:2409.02060): softmax, no renormalisation, both losses, AdamW.

    moelab run --config=experiments/olmoe_shaped.py:e64 --workdir=runs/olmoe_e64

4 layers, width 256, experts of width 256; 16 experts of which a token passes 2, or 64 and 8. `dense_e16` and
`dense_e64` are the same models with one SwiGLU of equal active width: the denominators of a step's time.

Lab book
  machine    not measured
  wall time  not measured
  result     not measured
  date       not measured
"""

import ml_collections

PRESETS = {
    "": {},
    "e64": {"moe": {"num_experts": 64}, "router": {"k": 8}},
    "dense_e16": {"moe": {"num_experts": 0}, "model": {"dense_width": 512}},
    "dense_e64": {"moe": {"num_experts": 0}, "model": {"dense_width": 2048}},
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    """Returns the fields that differ from the defaults of moelab/schema.py."""
    config = ml_collections.ConfigDict()
    config.model = dict(num_layers=4, width=256, num_heads=4, num_kv_heads=4, head_dim=64)
    config.moe = dict(num_experts=16, expert_width=256)
    config.router = dict(kind="top_k", k=2, score="softmax", renormalise=False)
    config.balance = dict(switch_loss=dict(coefficient=0.01), z_loss=dict(coefficient=0.001))
    config.optimizer = dict(kind="adamw", learning_rate=3e-3)
    config.schedule = dict(kind="warmup_cosine", warmup_steps=20)
    config.train = dict(num_steps=200, batch_size=16, length=256)
    config.update(PRESETS[preset])
    return config
