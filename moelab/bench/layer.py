"""Times the MoE layer against the fast dense feed-forward of equal active FLOPs.

The dense one: repeat each token K times, gate/up, SwiGLU, down, unrolled sum over K; weights as fast as XLA takes them,
[in, out]. The layer: sort by expert, gather, experts, weighted combine, weights [E, out, in].

T tokens, D model width, F expert width, G = 2F, E experts, K experts per token, N = T*K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import timing

PARTS = ("forward", "forward_backward")
DENSE = "dense"


class Shape(NamedTuple):
    """E, K, T, D and F."""

    experts: int
    k: int
    tokens: int = 4096
    width: int = 256
    hidden: int = 256


SHAPES = (Shape(8, 2), Shape(16, 2), Shape(64, 8), Shape(128, 8))


class Case(NamedTuple):
    """A layer to time.

    Attributes:
      function: from arrays to y_TD.
      arguments: of the function.
      num_differentiable: how many of them, from the first, the backward is for.
    """

    function: Callable[..., jax.Array]
    arguments: tuple[jax.Array, ...]
    num_differentiable: int


def measure(shapes: Sequence[Shape] = SHAPES, repeats: int = 21) -> list[dict[str, Any]]:
    """Times the forward, and forward with backward, of each case.

    Returns:
      One dict per shape, part and case, against the dense one: `timing.row`, `part`, `gflops` of active FLOPs, and
      `memory`, temporary bytes over the dense one's.
    """
    return [row for shape in shapes for row in _of_shape(Shape(*shape), repeats)]


def _of_shape(shape: Shape, repeats: int) -> list[dict[str, Any]]:
    programs = {
        (name, part): timing.compiled(function, case.arguments)
        for name, case in cases(shape).items()
        for part, function in zip(PARTS, (case.function, with_backward(case)), strict=True)
    }
    seconds = timing.interleaved({key: call for key, (call, _) in programs.items()}, repeats)
    found = []
    for index, part in enumerate(PARTS):
        of_part = {name: seconds[name, p] for name, p in seconds if p == part}
        flops = (1 + 2 * index) * 6 * shape.tokens * shape.k * shape.width * shape.hidden
        bytes_ = {name: programs[name, part][1].temp_size_in_bytes for name in of_part}
        for name in of_part:
            against = None if name == DENSE else DENSE
            row = timing.row(name, shape._asdict(), of_part, against, part=part)
            row["gflops"] = flops / row["median_s"] / 1e9
            row["memory"] = bytes_[name] / max(bytes_[DENSE], 1)
            found.append(row)
    return found


def cases(shape: Shape) -> dict[str, Case]:
    """The layers by name; the dense one first."""
    experts, k, tokens, width, hidden = shape
    keys = jax.random.split(jax.random.key(0), 6)
    x_TD = jax.random.normal(keys[0], (tokens, width))
    gate_up = jax.random.normal(keys[1], (experts, 2 * hidden, width)) * width**-0.5
    down = jax.random.normal(keys[2], (experts, width, hidden)) * hidden**-0.5
    weight_N = jnp.full(tokens * k, 1 / k)
    kernel_DE = jax.random.normal(keys[3], (width, experts)) * width**-0.5
    noise_TE = jax.random.gumbel(keys[4], (tokens, experts))
    # Zipf: expert i is chosen about in proportion to 1 / (i + 1); the first gets close to all tokens.
    skew_E = -jnp.log1p(jnp.arange(experts, dtype=jnp.float32))
    uniform_N = jax.lax.top_k(noise_TE, k)[1].reshape(-1)
    skewed_N = jax.lax.top_k(noise_TE + skew_E[None], k)[1].reshape(-1)
    flat_E = jnp.zeros(experts)
    layer, routed_layer = routed(k), with_router(k)
    return {
        DENSE: Case(dense(k), (x_TD, gate_up[0].T, down[0].T), 3),
        "layer": Case(layer, (x_TD, weight_N, gate_up, down, uniform_N), 4),
        "skewed": Case(layer, (x_TD, weight_N, gate_up, down, skewed_N), 4),
        "with router": Case(routed_layer, (x_TD, kernel_DE, gate_up, down, flat_E), 4),
    }


def dense(k: int) -> Callable[..., jax.Array]:
    """The denominator: one feed-forward, every token K times."""

    def layer(x_TD, gate_up_DG, down_FD):
        hidden_NG = jnp.repeat(x_TD, k, axis=0) @ gate_up_DG
        gate_NF, up_NF = jnp.split(hidden_NG, 2, axis=-1)
        y_TKD = ((jax.nn.silu(gate_NF) * up_NF) @ down_FD).reshape(x_TD.shape[0], k, -1)
        return sum((y_TKD[:, slot] for slot in range(1, k)), y_TKD[:, 0]) / k

    return layer


def routed(k: int) -> Callable[..., jax.Array]:
    """The layer, given the routing."""

    def layer(x_TD, weight_N, gate_up_EGD, down_EDF, expert_N):
        token_N = jnp.repeat(jnp.arange(x_TD.shape[0], dtype=jnp.int32), k)
        return pallas_kernels.routed_expert_mlp(
            x_TD, token_N, expert_N, weight_N, gate_up_EGD, down_EDF, assignments_per_token=k
        )

    return layer


def with_router(k: int) -> Callable[..., jax.Array]:
    """The layer and a softmax top-K router."""
    experts = routed(k)

    def layer(x_TD, kernel_DE, gate_up_EGD, down_EDF, bias_E):
        score_TE = jax.nn.softmax(x_TD @ kernel_DE + bias_E[None, :], axis=-1)
        expert_TK = jax.lax.top_k(jax.lax.stop_gradient(score_TE), k)[1]
        weight_TK = jnp.take_along_axis(score_TE, expert_TK, axis=1)
        return experts(x_TD, weight_TK.reshape(-1), gate_up_EGD, down_EDF, expert_TK.reshape(-1))

    return layer


def with_backward(case: Case) -> Callable[..., Any]:
    """The function's sum of squares and its gradients."""

    def loss(*arguments):
        return jnp.sum(case.function(*arguments) ** 2)

    return jax.value_and_grad(loss, argnums=tuple(range(case.num_differentiable)))
