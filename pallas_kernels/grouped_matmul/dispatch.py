"""Tokens to experts and back: sort by expert, compute, gather and sum. No scatter-add, in the gradients neither.

An assignment n sends token_N[n] to expert_N[n]; expert E means nobody: it sorts last, is outside every group and
contributes exactly zero. A token's contributions are added in float32 in slot order (the order of its assignments), so
the result does not depend on what other tokens do.

T tokens, N assignments, K assignments per token, M >= N rows of a padded buffer, E experts, D model width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.grouped_matmul import (
    api,
    choice,
    expert_windows,
    fused_experts,
    loading,
    quantized,
    windows,
    xla_windows,
)
from pallas_kernels.grouped_matmul.activation import SWIGLU, SwiGLU
from pallas_kernels.grouped_matmul.loading import Padded
from pallas_kernels.grouped_matmul.precision import (
    Bias,
    MatmulPrecision,
    MlpPrecision,
    Weight,
    both,
)

_INT32_MAX = 2**31 - 1


class Plan(NamedTuple):
    """Where every assignment goes; integers only.

    Attributes:
      assignment_N: assignment at each sorted position.
      token_N: its token.
      position_N: sorted position of each assignment.
      group_sizes_E: assignments per expert.
      kept: () assignments that have an expert; sorted positions from here on belong to nobody.
      slots: where each token's assignments are (`Slots`), or None where they are n = t * K + slot.
    """

    assignment_N: jax.Array
    token_N: jax.Array
    position_N: jax.Array
    group_sizes_E: jax.Array
    kept: jax.Array
    slots: Slots | None


class Slots(NamedTuple):
    """The assignments of each token: assignment_N[start_T[t] : start_T[t] + count_T[t]], in order."""

    assignment_N: jax.Array
    start_T: jax.Array
    count_T: jax.Array


def routed_expert_mlp(
    x_TD: jax.Array,
    token_N: jax.Array,
    expert_N: jax.Array,
    weight_N: jax.Array,
    gate_up_EGD: Weight | Padded,
    down_EDF: Weight | Padded,
    *,
    assignments_per_token: int | None,
    activation: SwiGLU = SWIGLU,
    bias: Bias = (None, None),
    precision: MatmulPrecision | MlpPrecision | None = None,
    x_amax: tuple[jax.Array | None, jax.Array | None] = (None, None),
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Sends tokens through the experts they are assigned to and sums what comes back.

        y[t] = sum over n with token[n] = t of weight[n] * expert_mlp[expert[n]](x[t])

    Args:
      x_TD: (T, D) float tokens.
      token_N: (N,) integers in 0..T-1.
      expert_N: (N,) integers in 0..E; E means no expert, whatever its weight.
      weight_N: (N,) float factors.
      gate_up_EGD: (E, 2F, D), gate rows first; float, `BlockScaled` or `loading.Padded`.
      down_EDF: (E, D, F) likewise.
      assignments_per_token: K where token_N is 0,..,0,1,..,1,.. with K of each (faster), else None.
      activation, bias, precision, x_amax, key: as in `expert_mlp`.
      implementation: as in `grouped_matmul`.

    Returns:
      y_TD: (T, D) in the dtype of x; differentiable in x, weight, biases and plain expert weights.

    Raises:
      ValueError: shapes, dtypes or indices that do not fit (indices are checked where their values are known).
      NotImplementedError: the named implementation cannot compute this.
    """
    api.check_feed_forward(x_TD, gate_up_EGD, down_EDF, bias)
    gate_up, down, bias = loading.as_multiplied(gate_up_EGD, down_EDF, bias)
    precision, num_experts = both(precision), gate_up.shape[0]
    api.check_precision(precision, gate_up, down)
    api.check_extras(precision, key, x_amax, num_experts)
    rows = jax.ShapeDtypeStruct((token_N.shape[0], gate_up.shape[2]), x_TD.dtype)
    backend, layers = choice.choose_both(implementation, rows, gate_up, down, precision)
    _check_assignments(x_TD, token_N, expert_N, weight_N, num_experts, assignments_per_token)
    if not x_TD.shape[0] or not token_N.shape[0]:
        return jnp.zeros_like(x_TD)
    tokens, width = x_TD.shape
    x_TD, token_N, expert_N, weight_N, gate_up, down, bias, x_amax = windows.vary_alike(
        *(x_TD, token_N, expert_N, weight_N, gate_up, down, bias, x_amax)
    )
    x_TD, weight_N = loading.widened(x_TD, gate_up.shape[2]), weight_N.astype(jnp.float32)
    plan = make_plan(token_N, expert_N, tokens, num_experts, assignments_per_token)
    in_one_loop = quantized.fuses(precision) and xla_windows.fuses(activation, bias)
    if backend is xla_windows and layers == (None, None) and in_one_loop:
        gate_up = quantized.fake_weights(gate_up, precision.gate_up)
        down = quantized.fake_weights(down, precision.down)
        return _fused(x_TD, weight_N, gate_up, down, plan)[:, :width]

    def unfused(x_TD, weight_N, bias, gate_up, down, x_amax, plan):
        x_ND = dispatch(x_TD, plan)
        sizes_E, dtype = plan.group_sizes_E, jnp.dtype(jnp.float32)
        extras = dict(x_amax=x_amax, key=key, kernels=layers, activation=activation, bias=bias)
        y_ND = quantized.expert_mlp(
            backend, x_ND, gate_up, down, sizes_E, precision, dtype, **extras
        )
        return combine(y_ND, weight_N, plan, tokens).astype(x_TD.dtype)

    arguments = (x_TD, weight_N, bias, gate_up, down, x_amax, plan)
    if fused_experts.fits(gate_up, down, precision, layers):
        return _in_kernels(*arguments, unfused, precision, activation)[:, :width]
    return unfused(*arguments)[:, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _in_kernels(x_TD, weight_N, bias, gate_up, down, x_amax, plan, unfused, precision, activation):
    """Packed experts in fused kernels; the gradient is that of the unfused composition."""
    # A kernel multiplies sums with weights, and adds a bias to them: with one, weights come after it.
    folded = bias[1] is None
    sorted_N = weight_N[plan.assignment_N] if folded else None
    operands = (x_TD, plan.token_N, sorted_N, gate_up, down, plan.group_sizes_E)
    y_ND = fused_experts.rows(*operands, precision, x_amax, activation, bias)
    weight_N = None if folded else weight_N
    return _sum_slots(y_ND, weight_N, plan, x_TD.shape[0]).astype(x_TD.dtype)


def _in_kernels_forward(*arguments):
    return _in_kernels(*arguments), arguments[:7]


def _in_kernels_backward(unfused, precision, activation, residuals, dy_TD):
    *differentiable, gate_up, down, x_amax, plan = residuals
    frozen = (gate_up, down, x_amax, plan)
    _, back = jax.vjp(lambda *arguments: unfused(*arguments, *frozen), *differentiable)
    return *back(dy_TD), None, None, None, None


_in_kernels.defvjp(_in_kernels_forward, _in_kernels_backward)


def make_plan(
    token_N: jax.Array,
    expert_N: jax.Array,
    num_tokens: int,
    num_experts: int,
    assignments_per_token: int | None,
) -> Plan:
    """Sorts assignments by expert, stably.

    Args:
      token_N: int, token of each assignment.
      expert_N: int, its expert; num_experts means none.
      num_tokens: T.
      num_experts: E.
      assignments_per_token: K of the regular layout n = t * K + slot, or None.
    """
    token_N, expert_N = token_N.astype(jnp.int32), expert_N.astype(jnp.int32)
    count = expert_N.shape[0]
    assignment_N, end_E = _sort(expert_N, num_experts)
    numbers_N = jnp.arange(count, dtype=jnp.int32)
    position_N = jnp.zeros_like(assignment_N).at[assignment_N].set(numbers_N, unique_indices=True)
    slots = None
    if assignments_per_token is None:
        by_token_N, end_T = _sort(token_N, num_tokens)
        count_T = jnp.diff(end_T, prepend=jnp.zeros(1, jnp.int32))
        slots = Slots(by_token_N, end_T - count_T, count_T)
        sorted_token_N = token_N[assignment_N]
    else:
        sorted_token_N = assignment_N // assignments_per_token
    sizes_E = jnp.diff(end_E, prepend=jnp.zeros(1, jnp.int32))
    return Plan(assignment_N, sorted_token_N, position_N, sizes_E, end_E[-1], slots)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, plan: Plan) -> jax.Array:
    """Returns the tokens in sorted order, one row per assignment; zeros where there is no expert."""
    return _zero_tail(x_TD[plan.token_N], plan)


def _dispatch_forward(x_TD, plan):
    return dispatch(x_TD, plan), (plan, jnp.zeros((x_TD.shape[0], 0), x_TD.dtype))


def _dispatch_backward(residuals, dx_ND):
    plan, like_T0 = residuals
    return _sum_slots(dx_ND, None, plan, like_T0.shape[0]).astype(like_T0.dtype), None


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def combine(y_ND: jax.Array, weight_N: jax.Array, plan: Plan, num_tokens: int) -> jax.Array:
    """Returns float32 sums over each token's assignments of weight times row; y in sorted order, weight is not."""
    return _sum_slots(y_ND, weight_N, plan, num_tokens)


def _combine_forward(y_ND, weight_N, plan, num_tokens):
    return combine(y_ND, weight_N, plan, num_tokens), (y_ND, weight_N, plan)


def _combine_backward(num_tokens, residuals, dy_TD):
    y_ND, weight_N, plan = residuals
    dy_ND = dy_TD[plan.token_N]
    dweight_N = jnp.sum(dy_ND * y_ND.astype(jnp.float32), axis=1)
    scale_N = weight_N[plan.assignment_N]
    dy_ND = _zero_tail(dy_ND * scale_N[:, None], plan).astype(y_ND.dtype)
    return dy_ND, _unsort(dweight_N, plan), None


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def _fused(x_TD, weight_N, gate_up, down, plan):
    y_MD, _ = _experts(x_TD, gate_up, down, plan)
    return _sum_slots(y_MD, weight_N, plan, x_TD.shape[0]).astype(x_TD.dtype)


def _fused_forward(x_TD, weight_N, gate_up, down, plan):
    y_MD, hidden_MG = _experts(x_TD, gate_up, down, plan, keep_hidden=True)
    y_TD = _sum_slots(y_MD, weight_N, plan, x_TD.shape[0]).astype(x_TD.dtype)
    return y_TD, (x_TD, weight_N, gate_up, down, plan, hidden_MG)


def _fused_backward(residuals, dy_TD):
    x_TD, weight_N, gate_up, down, plan, hidden_MG = residuals
    scale_N = weight_N[plan.assignment_N]
    dx_MD, dgate_up, ddown, dweight_M = expert_windows.backward(
        x_TD, plan.token_N, scale_N, gate_up, down, plan.group_sizes_E, hidden_MG, dy_TD
    )
    dx_TD = _sum_slots(dx_MD, None, plan, x_TD.shape[0]).astype(x_TD.dtype)
    return dx_TD, _unsort(dweight_M, plan), dgate_up, ddown, None


_fused.defvjp(_fused_forward, _fused_backward)


def _experts(x_TD, gate_up, down, plan, **keep_hidden):
    sizes_E, dtype = plan.group_sizes_E, jnp.dtype(jnp.float32)
    return expert_windows.forward(x_TD, plan.token_N, gate_up, down, sizes_E, dtype, **keep_hidden)


def _sort(key_N: jax.Array, bound: int) -> tuple[jax.Array, jax.Array]:
    """Stable order of keys 0..bound, and for each key below bound the end of its run."""
    count = key_N.shape[0]
    if (bound + 1) * count <= _INT32_MAX:
        # Key and number in one integer: sorting one operand is several times faster than two.
        packed_N = jnp.sort(key_N * count + jnp.arange(count, dtype=jnp.int32))
        order_N, sorted_N = packed_N % count, packed_N // count
    else:
        order_N = jnp.argsort(key_N, stable=True).astype(jnp.int32)
        sorted_N = key_N[order_N]
    keys = jnp.arange(bound, dtype=jnp.int32)
    return order_N, jnp.searchsorted(sorted_N, keys, side="right").astype(jnp.int32)


def _sum_slots(
    a_MD: jax.Array, weight_N: jax.Array | None, plan: Plan, num_tokens: int
) -> jax.Array:
    """Float32 sums over each token's assignments, in slot order, of sorted rows times weights (1 if None)."""

    def row(assignment_T, exists_T):
        position_T = plan.position_N[assignment_T]
        value_TD = a_MD[position_T].astype(jnp.float32)
        if weight_N is not None:
            value_TD = value_TD * weight_N[assignment_T][:, None]
        # Rows of nobody hold garbage: where, since 0 * NaN is NaN.
        return jnp.where((exists_T & (position_T < plan.kept))[:, None], value_TD, 0.0)

    if plan.slots is None:
        per_token = plan.position_N.shape[0] // num_tokens
        first_T = jnp.arange(num_tokens, dtype=jnp.int32) * per_token
        rows = (row(first_T + slot, True) for slot in range(per_token))
        return functools.reduce(jnp.add, rows)

    slots, last = plan.slots, plan.position_N.shape[0] - 1

    def add(slot, sum_TD):
        assignment_T = slots.assignment_N[jnp.minimum(slots.start_T + slot, last)]
        return sum_TD + row(assignment_T, slot < slots.count_T)

    sum_TD = windows.zeros((num_tokens, a_MD.shape[1]), jnp.float32, (a_MD, weight_N, plan))
    return lax.fori_loop(0, jnp.max(slots.count_T), add, sum_TD)


def _zero_tail(a_ND: jax.Array, plan: Plan) -> jax.Array:
    inside_N = jnp.arange(a_ND.shape[0]) < plan.kept
    return jnp.where(inside_N[:, None], a_ND, jnp.zeros((), a_ND.dtype))


def _unsort(a_M: jax.Array, plan: Plan) -> jax.Array:
    """One number per assignment from sorted order; 0 where there is no expert."""
    return jnp.where(plan.position_N < plan.kept, a_M[plan.position_N], 0.0)


def _check_assignments(x_TD, token_N, expert_N, weight_N, num_experts, per_token) -> None:
    shapes = [a.shape for a in (token_N, expert_N, weight_N)]
    if token_N.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(f"token, expert and weight must all be (N,), got {shapes}")
    for name, a in (("token_N", token_N), ("expert_N", expert_N)):
        if not jnp.issubdtype(a.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {a.dtype}")
    if not jnp.issubdtype(weight_N.dtype, jnp.floating):
        raise ValueError(f"weight_N must be floating point, got {weight_N.dtype}")
    tokens = x_TD.shape[0]
    if per_token is not None and token_N.shape[0] != tokens * per_token:
        raise ValueError(
            f"{per_token} assignments per token of {tokens} tokens need N = {tokens * per_token}, "
            f"got {token_N.shape[0]}"
        )
    _check_values("token_N", token_N, tokens - 1)
    _check_values("expert_N", expert_N, num_experts)
    if per_token is not None and not isinstance(token_N, jax.core.Tracer):
        wanted = np.repeat(np.arange(tokens), per_token)
        if not np.array_equal(np.asarray(token_N), wanted):
            raise ValueError(f"token_N is not each token {per_token} times in order; pass None")


def _check_values(name: str, a: jax.Array, largest: int) -> None:
    if isinstance(a, jax.core.Tracer) or not a.size:
        return
    low, high = np.asarray(a).min(), np.asarray(a).max()
    if low < 0 or high > largest:
        raise ValueError(f"{name} must be in 0..{largest}, got {low}..{high}")
