"""Times the MoE layer on CPU against the fast dense feed-forward of equal active FLOPs.

    python bench/layer.py [--json] [--repeats 21] [--shape 16,2 ...]

Both run in one process with one XLA flag, interleaved. The dense one: repeat each token K times, gate/up, SwiGLU, down,
unrolled sum over K; weights as fast as XLA takes them, [in, out]. The layer: sort by expert, gather, experts, weighted
combine, weights [E, out, in]. A ratio is the median over rounds of layer / dense within one round (the machine's speed
drifts); beside it the ratio of the fastest times. T=4096, D=F=256, float32.
Bars: forward <= 1.3, forward + backward <= 1.6, temporary memory <= 1.8.

T tokens, D model width, F expert width, E experts, K experts per token, N = T*K.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "--xla_cpu_experimental_ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_experimental_ynn_fusion_type=".strip()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import pallas_kernels  # noqa: E402

T, D, F = 4096, 256, 256
SHAPES = ((8, 2), (16, 2), (64, 8), (128, 8))


def dense(k):
    """The denominator: one feed-forward, every token K times."""

    def layer(x_TD, gate_up_DG, down_FD):
        hidden_NG = jnp.repeat(x_TD, k, axis=0) @ gate_up_DG
        gate_NF, up_NF = jnp.split(hidden_NG, 2, axis=-1)
        y_TKD = ((jax.nn.silu(gate_NF) * up_NF) @ down_FD).reshape(T, k, D)
        return sum((y_TKD[:, slot] for slot in range(1, k)), y_TKD[:, 0]) / k

    return layer


def routed(k):
    """The layer, given the routing."""
    token_N = jnp.repeat(jnp.arange(T, dtype=jnp.int32), k)

    def layer(x_TD, weight_N, gate_up_EGD, down_EDF, expert_N):
        return pallas_kernels.routed_expert_mlp(
            x_TD, token_N, expert_N, weight_N, gate_up_EGD, down_EDF, assignments_per_token=k
        )

    return layer


def with_router(k):
    """The layer and a softmax top-K router."""
    experts = routed(k)

    def layer(x_TD, kernel_DE, gate_up_EGD, down_EDF, bias_E):
        score_TE = jax.nn.softmax(x_TD @ kernel_DE + bias_E[None, :], axis=-1)
        expert_TK = jax.lax.top_k(jax.lax.stop_gradient(score_TE), k)[1]
        weight_TK = jnp.take_along_axis(score_TE, expert_TK, axis=1)
        return experts(x_TD, weight_TK.reshape(-1), gate_up_EGD, down_EDF, expert_TK.reshape(-1))

    return layer


def cases(num_experts, k):
    """(function, arguments, number of differentiable arguments) by name; the dense one first."""
    keys = jax.random.split(jax.random.key(0), 6)
    x_TD = jax.random.normal(keys[0], (T, D))
    gate_up = jax.random.normal(keys[1], (num_experts, 2 * F, D)) * D**-0.5
    down = jax.random.normal(keys[2], (num_experts, D, F)) * F**-0.5
    weight_N = jnp.full(T * k, 1 / k)
    kernel_DE = jax.random.normal(keys[3], (D, num_experts)) * D**-0.5
    noise_TE = jax.random.gumbel(keys[4], (T, num_experts))
    # Zipf: expert i is chosen about in proportion to 1 / (i + 1); the first gets close to all tokens.
    skew_E = -jnp.log1p(jnp.arange(num_experts, dtype=jnp.float32))
    uniform_N = jax.lax.top_k(noise_TE, k)[1].reshape(-1)
    skewed_N = jax.lax.top_k(noise_TE + skew_E, k)[1].reshape(-1)
    flat_E = jnp.zeros(num_experts)
    return {
        "dense": (dense(k), (x_TD, gate_up[0].T, down[0].T), 3),
        "layer": (routed(k), (x_TD, weight_N, gate_up, down, uniform_N), 4),
        "skewed": (routed(k), (x_TD, weight_N, gate_up, down, skewed_N), 4),
        "with router": (with_router(k), (x_TD, kernel_DE, gate_up, down, flat_E), 4),
    }


def compiled(function, arguments, num_differentiable):
    """Compiled forward, and forward with backward."""

    def loss(*args):
        return jnp.sum(function(*args) ** 2)

    gradient = jax.value_and_grad(loss, argnums=tuple(range(num_differentiable)))
    return [jax.jit(f).lower(*arguments).compile() for f in (function, gradient)]


def measure(num_experts, k, repeats):
    """One row of the table: medians in ms, and what memory_analysis says."""
    programs = {
        (name, part): (program, arguments)
        for name, (function, arguments, count) in cases(num_experts, k).items()
        for part, program in enumerate(compiled(function, arguments, count))
    }
    seconds = {key: [] for key in programs}
    for repeat in range(repeats + 1):
        for key, (program, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if repeat:  # the first is a warm-up
                seconds[key].append(time.perf_counter() - start)
    row = {"experts": num_experts, "k": k}
    for part, suffix in enumerate(("forward", "forward_backward")):
        base = programs["dense", part][0].memory_analysis().temp_size_in_bytes
        median = {name: statistics.median(seconds[name, part]) for name in cases_named(programs)}
        best = {name: min(seconds[name, part]) for name in cases_named(programs)}
        memory = programs["layer", part][0].memory_analysis().temp_size_in_bytes
        row[suffix] = {
            "dense_ms": median["dense"] * 1e3,
            "dense_gflops": (1 + 2 * part) * 6 * T * k * D * F / median["dense"] / 1e9,
            "ratio": {n: paired(seconds, n, part) for n in median if n != "dense"},
            "ratio_of_minima": {n: s / best["dense"] for n, s in best.items() if n != "dense"},
            "memory_ratio": memory / base,
        }
    return row


def paired(seconds, name, part):
    """Median over the rounds of a case's time over the dense time of the same round."""
    rounds = zip(seconds[name, part], seconds["dense", part], strict=True)
    return statistics.median(layer / base for layer, base in rounds)


def cases_named(programs):
    """Names of the cases, in order."""
    return list(dict.fromkeys(name for name, _ in programs))


def table(rows):
    """The rows as text."""
    lines = [
        "                    dense           layer        skewed   with router   memory",
        "  E  k  part      ms  GFLOP/s   med   min     med   min     med   min    ratio",
    ]
    for row in rows:
        for part in ("forward", "forward_backward"):
            m = row[part]
            ratios = "   ".join(
                f"{m['ratio'][name]:5.2f} {m['ratio_of_minima'][name]:5.2f}" for name in m["ratio"]
            )
            lines.append(
                f"{row['experts']:3d} {row['k']:2d}  {'fwd' if part == 'forward' else 'f+b'}  "
                f"{m['dense_ms']:7.1f}  {m['dense_gflops']:7.0f} {ratios}   {m['memory_ratio']:6.2f}"
            )
    return "\n".join(lines)


def main():
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--shape", action="append", metavar="E,K", help="default: all four")
    options = parser.parse_args()
    shapes = SHAPES
    if options.shape:
        shapes = [tuple(map(int, shape.split(","))) for shape in options.shape]
    rows = [measure(experts, k, options.repeats) for experts, k in shapes]
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
