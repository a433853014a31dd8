"""Times products with packed FP4 experts on CPU against float32 experts, at one and at eight rows per expert.

    python bench/packed.py [--json] [--repeats 31] [--format nvfp4] [--shape E,k,D,F ...]

All programs of a line run in one process, interleaved. Three operations, each with r rows per expert: the grouped
matmul (gate and up) and the feed-forward, with exactly r rows for each of the E experts, and the routed layer of
T = r E / k tokens with k random experts each; and the routed layer of one token, which is what generation runs.
"float32" is the same code with float32 weights. "best" is the fastest of that and of float32 products written by hand
for groups of exactly r rows (both layouts of the weights, an expert at a time or gathered into a batch); for one token
those neither sort nor combine. Ratios are medians over rounds of packed / float32 in one round; beside them the ratio
of the fastest times. Memory is packed weights and temporaries over the bytes of the float32 weights.

Bars: 3 at one row and 1.5 at eight against float32; 1.1 at one row against the best; memory 0.2.

T tokens, D model width, F expert width, G = 2F, E experts, k experts per token, r rows per expert.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelab import environment  # noqa: E402

environment.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import pallas_kernels  # noqa: E402
from pallas_kernels import formats, timing  # noqa: E402

SHAPES = ((64, 8, 1024, 512), (64, 8, 256, 256), (8, 2, 1024, 512))
BARS = {1: 3.0, 8: 1.5}
BEST_BAR, MEMORY_BAR = 1.1, 0.2


def grouped(x_ND, weights, sizes_E):
    """Gate and up of sorted rows."""
    precision = pallas_kernels.MatmulPrecision()
    return pallas_kernels.quantized_grouped_matmul(x_ND, weights[0], sizes_E, precision)


def feed_forward(x_ND, weights, sizes_E):
    """The feed-forward of sorted rows."""
    return pallas_kernels.expert_mlp(x_ND, *weights, sizes_E)


def routed(k):
    """The layer without its router: sort, experts, weighted sum."""

    def layer(x_TD, weights, expert_N):
        token_N = jnp.repeat(jnp.arange(x_TD.shape[0], dtype=jnp.int32), k)
        weight_N = jnp.full(token_N.shape, 1 / k)
        return pallas_kernels.routed_expert_mlp(
            x_TD, token_N, expert_N, weight_N, *weights, assignments_per_token=k
        )

    return layer


def by_hand(multiply, gathered):
    """Returns a float32 layer of one or two weights, for r rows of each of some experts.

    Args:
      multiply: (R, K) rows, one expert's weight -> (R, N).
      gathered: all experts' weights in one batch, not one after the other.
    """

    def product(x_nRK, w, expert_n):
        if gathered:
            return jax.vmap(multiply)(x_nRK, w[expert_n])
        return jax.lax.map(lambda pair: multiply(pair[0], w[pair[1]]), (x_nRK, expert_n))

    def layer(x_nRD, weights, expert_n):
        y_nRG = product(x_nRD, weights[0], expert_n)
        if len(weights) == 1:
            return y_nRG
        gate_nRF, up_nRF = jnp.split(y_nRG, 2, axis=-1)
        return product(jax.nn.silu(gate_nRF) * up_nRF, weights[1], expert_n)

    return layer


def left(x_RK, w_NK):
    """As few_rows.py multiplies."""
    x_KR = jax.lax.optimization_barrier(x_RK.T)
    return jax.lax.optimization_barrier(w_NK @ x_KR).T


def right(x_RK, w_NK):
    """As one would write it."""
    return jax.lax.dot_general(x_RK, w_NK, (((1,), (1,)), ((), ())))


def turned(x_RK, w_KN):
    """With weights that were stored the other way."""
    return x_RK @ w_KN


def measure(shape, format, repeats):
    """Rows of the table, for one shape of experts."""
    num_experts, k, width, hidden = shape
    keys = jax.random.split(jax.random.key(0), 4)
    gate_up = jax.random.normal(keys[0], (num_experts, 2 * hidden, width)) * width**-0.5
    down = jax.random.normal(keys[1], (num_experts, width, hidden)) * hidden**-0.5
    plain = (gate_up, down)
    packed = jax.block_until_ready(jax.jit(lambda w: formats.quantize(w, format))(gate_up))
    packed = (packed, jax.jit(lambda w: formats.quantize(w, format))(down))
    found = []
    for rows in BARS:
        sizes_E = jnp.full(num_experts, rows, jnp.int32)
        x_ND = jax.random.normal(keys[2], (num_experts * rows, width))
        for num_layers, function in ((1, grouped), (2, feed_forward)):
            calls, memory = programs(function, (x_ND, sizes_E), plain, packed, num_layers)
            expert_n = jnp.arange(num_experts)
            calls |= hand_written(x_ND, plain[:num_layers], expert_n)
            found.append(line(function.__name__, shape, rows, calls, memory, repeats))
    for tokens in (1, num_experts // k, 8 * num_experts // k):
        x_TD = jax.random.normal(keys[2], (tokens, width))
        noise_TE = jax.random.gumbel(keys[3], (tokens, num_experts))
        expert_N = jax.lax.top_k(noise_TE, k)[1].reshape(-1)
        calls, memory = programs(routed(k), (x_TD, expert_N), plain, packed, 2)
        if tokens == 1:
            calls |= hand_written(jnp.repeat(x_TD, k, axis=0), plain, expert_N)
        rows = max(tokens * k // num_experts, 1)
        found.append(line(f"routed, T={tokens}", shape, rows, calls, memory, repeats))
    return found


def programs(function, inputs, plain, packed, num_layers):
    """Calls with float32 and with packed weights, and the packed one's share of the float32 weights' bytes."""
    x, other = inputs
    calls, memory = {}, {}
    for name, weights in (("float32", plain), ("packed", packed)):
        weights = weights[:num_layers]
        calls[name], found = timing.compiled(function, (x, weights, other))
        stored = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
        memory[name] = stored + found.temp_size_in_bytes
    return calls, memory["packed"] / sum(w.nbytes for w in plain[:num_layers])


def hand_written(x_ND, weights, expert_n):
    """Calls of `by_hand`; the copy of the weights in the other layout is made outside."""
    x_nRD = x_ND.reshape(expert_n.shape[0], -1, x_ND.shape[1])
    other = tuple(jnp.swapaxes(w, 1, 2) for w in weights)
    found = {}
    for multiply, w in ((left, weights), (right, weights), (turned, other)):
        for name, gathered in ((multiply.__name__, False), (f"{multiply.__name__}, batch", True)):
            layer = by_hand(multiply, gathered)
            found[name], _ = timing.compiled(layer, (x_nRD, w, expert_n))
    return found


def line(operation, shape, rows, calls, memory, repeats):
    """One row: packed against float32 and against the best."""
    seconds = timing.interleaved(calls, repeats)
    sizes = dict(zip(("experts", "k", "width", "hidden"), shape, strict=True))
    sizes |= {"rows_per_expert": rows, "operation": operation}
    best = min((name for name in seconds if name != "packed"), key=lambda n: min(seconds[n]))
    row = timing.row("packed", sizes, seconds, "float32", memory=memory)
    to_best = timing.row("packed", sizes, seconds, best)
    row |= {"float32_s": timing.quartiles(seconds["float32"])[1], "best": best}
    return row | {f"best_{key}": to_best[key] for key in ("ratio", "ratio_of_best")}


def table(rows):
    """The rows as text."""
    head = "  E k    D   F  operation      rows  float32   packed    /float32      /best          memory"
    lines = [head, " " * 34 + "     ms       ms    med   min    med   min"]
    for row in rows:
        s = row["shape"]
        lines.append(
            f"{s['experts']:3d} {s['k']} {s['width']:4d} {s['hidden']:3d}  {s['operation']:14s} "
            f"{s['rows_per_expert']:3d} {row['float32_s'] * 1e3:8.2f} {row['median_s'] * 1e3:8.2f}  "
            f"{row['ratio']:5.2f} {row['ratio_of_best']:5.2f}  "
            f"{row['best_ratio']:5.2f} {row['best_ratio_of_best']:5.2f}  {row['memory']:6.3f}  {row['best']}"
        )
    return "\n".join(lines)


def main():
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--format", default="nvfp4", choices=("nvfp4", "nvfp4_46", "mxfp4"))
    parser.add_argument("--shape", action="append", metavar="E,k,D,F", help="default: three")
    options = parser.parse_args()
    shapes = SHAPES
    if options.shape:
        shapes = [tuple(map(int, shape.split(","))) for shape in options.shape]
    rows = [row for s in shapes for row in measure(s, options.format, options.repeats)]
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
