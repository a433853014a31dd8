"""Times whole training steps against the same model with dense feed-forwards of equal active width.

OLMoE-shaped (experiments/olmoe_shaped.py): 4 layers, D=256, F=256, vocabulary 4096, 16 sequences of 256 tokens,
float32, AdamW. Every round runs the best float32 matmul (2048 cubed) and one step of each model in turn. Model FLOPs
are moelab.size.count's: three times the forward matmuls with full attention.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moelab import config as configs
from moelab import data, model, optimizer, size, step
from moelab.quant import recipes
from pallas_kernels import timing

_EXPERIMENT = "olmoe_shaped"
_MATMUL = 2048


class Pair(NamedTuple):
    """Two models of equal active width.

    Attributes:
      sparse, dense: configs, FILE or NAME[:PRESET].
      bar: what sparse / dense should stay below.
    """

    sparse: str
    dense: str
    bar: float


PAIRS = {
    "E=16 k=2": Pair(_EXPERIMENT, f"{_EXPERIMENT}:dense_e16", 1.25),
    "E=64 k=8": Pair(f"{_EXPERIMENT}:e64", f"{_EXPERIMENT}:dense_e64", 1.4),
}
VOCAB = 4096


def make_run(config: str, recipe: str = "none") -> tuple[Callable[[], Any], int, dict[str, int]]:
    """Returns a call that runs one step under a recipe, the model FLOPs of a step, and its shape."""
    loaded = configs.load(config).config
    batch, length = loaded.train.batch_size, loaded.train.length
    transformer = model.from_config(loaded, VOCAB, recipe=recipes.named(recipe))
    shapes = jax.eval_shape(lambda: model.init(transformer, jax.random.key(0)))["params"]
    tx = optimizer.make(loaded, shapes)
    train_step = jax.jit(step.make_train_step(loaded, transformer, tx), donate_argnums=0)
    state = [jax.jit(lambda: step.init_state(transformer, tx, 0))()]
    token = np.random.default_rng(0).integers(0, VOCAB, (batch, length + 1)).astype(np.int32)
    zeros = np.zeros((batch, length), np.int32)
    tokens = data.Batch(token[:, :-1], token[:, 1:], zeros == 0, zeros[:, 0], zeros)
    one = np.float32(1)

    def run():
        state[0], report = train_step(state[0], tokens, one)
        return state[0], report

    flops = size.count(loaded, VOCAB)["flops_per_token"]["train"] * batch * length
    shape = {"layers": loaded.model.num_layers, "width": loaded.model.width}
    shape |= {"batch": batch, "length": length, "vocabulary": VOCAB}
    return run, flops, shape


def make_matmul() -> tuple[Callable[[], Any], int]:
    """Returns a call of a float32 matmul of 2048 cubed, and its FLOPs."""
    a = jax.random.normal(jax.random.key(0), (_MATMUL, _MATMUL))
    run = jax.jit(lambda a: a @ a)
    return (lambda: run(a)), 2 * _MATMUL**3


def measure(names: Sequence[str] | None = None, repeats: int = 7) -> list[dict[str, Any]]:
    """Times pairs of models.

    Args:
      names: keys of PAIRS; None: all.
      repeats: rounds.

    Returns:
      One dict per pair: `timing.row` of the sparse model against the dense one, `dense_s`, `bar`, `utilisation` of the
      matmul's rate by both models, and that rate.
    """
    return [_of_pair(name, repeats) for name in names or PAIRS]


def _of_pair(name: str, repeats: int) -> dict[str, Any]:
    """Only this pair's models are in memory."""
    pair = PAIRS[name]
    matmul, matmul_flops = make_matmul()
    sparse, sparse_flops, shape = make_run(pair.sparse)
    dense, dense_flops, _ = make_run(pair.dense)
    calls = {"matmul": matmul, "sparse": sparse, "dense": dense}
    seconds = timing.interleaved(calls, repeats, warm_ups=2)
    peak = matmul_flops / min(seconds["matmul"])
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return timing.row("sparse", {"model": name} | shape, seconds, "dense") | {
        "dense_s": median["dense"],
        "bar": pair.bar,
        "utilisation": sparse_flops / median["sparse"] / peak,
        "dense_utilisation": dense_flops / median["dense"] / peak,
        "matmul_gflops": peak / 1e9,
    }
