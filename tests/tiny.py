"""A config and a batch small enough that a test's time is its compilation."""

import jax.numpy as jnp
import numpy as np

from moelab import config, model

OVERRIDES = {
    "model": dict(num_layers=2, width=32, num_heads=2, num_kv_heads=1, head_dim=16, dense_width=64),
    "moe": dict(num_experts=4, expert_width=32),
    "train": dict(num_steps=4, batch_size=4, length=16, head_chunk=16),
    "tokenizer": dict(kind="byte"),
    "schedule": dict(warmup_steps=1),
}
VOCAB = 257


def make_config(**sections):
    """The tiny config with sections updated: make_config(moe=dict(num_experts=8))."""
    merged = {name: dict(values) for name, values in OVERRIDES.items()}
    for name, values in sections.items():
        if isinstance(values, dict):
            merged.setdefault(name, {}).update(values)
        else:
            merged[name] = values
    return config.from_dict(merged)


def make_inputs(batch=4, length=16, seed=0, mask=None):
    """Random tokens as model.Inputs."""
    token = np.random.default_rng(seed).integers(0, VOCAB, (batch, length)).astype(np.int32)
    mask = np.ones((batch, length), bool) if mask is None else mask
    return model.Inputs(
        jnp.asarray(token),
        jnp.asarray(mask),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((2,), jnp.uint32),
    )
