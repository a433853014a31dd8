"""What a config would cost: parameters, bytes and FLOPs, counted from shapes."""

from __future__ import annotations

import jax

from moelab import model as model_lib
from moelab import optimizer, parallel
from pallas_kernels import device


def _active_share(config) -> float:
    """Expert parameters that a token's computation costs over all of them; with a router, by its nominal k."""
    if config.moe.slots_per_expert:
        return config.moe.slots_per_expert / config.train.length
    return config.router.k / config.moe.num_experts


def count(config, vocab_size: int) -> dict:
    """Counts parameters, bytes and FLOPs of a config without touching a device.

    FLOPs per token count two per multiply-add of every matmul on the token's path and full (not causal) attention over
    `train.length` keys; training is three times the forward pass.

    Returns:
      parameters total/active/expert, bytes of parameters and optimizer state, flops_per_token forward/train.
    """
    shown = config.copy_and_resolve_references()
    shown.moe.implementation = "auto"
    model = model_lib.from_config(shown, vocab_size, parallel.abstract_mesh())
    # Shapes are the same everywhere, and to ask which GPU is here would start it.
    with device.assume(device.CPU):
        shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))["params"]
    state = jax.eval_shape(optimizer.make(config, shapes).init, shapes)
    total, expert = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        total += leaf.size
        expert += leaf.size if "['experts']" in jax.tree_util.keystr(path) else 0
    m, layers = config.model, len(model_lib.moe_layers(config))
    share = _active_share(config) if layers else 0.0
    active = total - expert + round(expert * min(1.0, share))
    computed = total - expert + round(expert * share)
    embedding = 0 if m.tied_head else vocab_size * m.width  # a look-up, not a matmul
    attention_flops = 4 * config.train.length * m.num_heads * m.head_dim * m.num_layers
    forward = 2 * (computed - embedding) + attention_flops
    nbytes = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))  # noqa: E731
    return {
        "parameters": {"total": total, "active": active, "expert": expert},
        "bytes": {"parameters": nbytes(shapes), "optimizer": nbytes(state)},
        "flops_per_token": {"forward": forward, "train": 3 * forward},
    }
