"""A small layer of experts, its calibration rows, and statistics of them made in numpy."""

import jax.numpy as jnp
import numpy as np

from moelab.quant import statistics

EXPERTS, WIDTH, HIDDEN, ROWS = 3, 64, 32, 400


def make_weights(seed=0, experts=EXPERTS, width=WIDTH, hidden=HIDDEN):
    """Float32 gate_up (E, 2F, D) and down (E, D, F)."""
    rng = np.random.default_rng(seed)
    gate_up = rng.standard_normal((experts, 2 * hidden, width)) * width**-0.5
    down = rng.standard_normal((experts, width, hidden)) * hidden**-0.5
    return {"gate_up": gate_up.astype(np.float32), "down": down.astype(np.float32)}


def make_rows(seed=1, experts=EXPERTS, rows=ROWS, width=WIDTH):
    """Correlated rows for each expert, with a few loud channels: (E, rows, D) float32."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width)) * 0.6 ** np.arange(width)[:, None]
    x = rng.standard_normal((experts, rows, width)) @ mix + 0.05 * rng.standard_normal(width)
    x[..., ::17] *= 8
    return x.astype(np.float32)


def experts_output(weights, x, e):
    """down(silu(gate) * up) of one expert in float64, and the hidden rows."""
    pre = x.astype(np.float64) @ np.asarray(weights["gate_up"][e], np.float64).T
    gate, up = np.split(pre, 2, axis=-1)
    hidden = gate / (1 + np.exp(-gate)) * up
    return hidden @ np.asarray(weights["down"][e], np.float64).T, hidden


def input_statistics(rows):
    """Of one array of rows per expert, by definition."""
    width = rows[0].shape[-1]
    hessian = np.zeros((len(rows), width, width))
    mean, largest = np.zeros((len(rows), width)), np.zeros((len(rows), width))
    for e, x in enumerate(rows):
        for row in x.astype(np.float64):
            hessian[e] += np.outer(row, row) / len(x)
            mean[e] += np.abs(row) / len(x)
            largest[e] = np.maximum(largest[e], np.abs(row))
    f32 = [a.astype(np.float32) for a in (hessian, mean, largest)]
    return statistics.InputStatistics(*f32, np.linalg.matrix_rank(f32[0], hermitian=True))


def make_statistics(weights, rows):
    """LayerStatistics of (E, rows, D)."""
    hidden = [experts_output(weights, x, e)[1] for e, x in enumerate(rows)]
    tokens = np.array([len(x) for x in rows], np.int64)
    source = tuple("own" if len(x) else "none" for x in rows)
    return statistics.LayerStatistics(
        tokens, source, input_statistics(rows), input_statistics(hidden)
    )


def output_error(before, after, hessian):
    """trace(delta H delta^T) of each expert in float64."""
    delta = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return np.einsum("enk,ekl,enl->e", delta, np.asarray(hessian, np.float64), delta)


def arrays(weights):
    """As jax arrays."""
    return {name: jnp.asarray(w) for name, w in weights.items()}
