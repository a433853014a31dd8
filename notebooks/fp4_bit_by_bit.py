# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # FP4, bit by bit
#
# What four bits can say, what a scale adds, where the error goes, and how one trains through it. The numbers come from
# the same code as the kernels' reference (`pallas_kernels/formats`).

# %%
import moelab

moelab.prepare()

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from pallas_kernels import formats
from pallas_kernels.formats import elements

# %% [markdown]
# ## Sixteen codes
#
# E2M1: a sign, two bits of exponent, one of mantissa. The steps double from 2 to 4 and from 4 to 6 on; there is no NaN
# and no infinity.

# %%
codes = jnp.arange(16, dtype=jnp.uint8)
values = np.asarray(elements.decode(codes, formats.E2M1))
print({f"{int(c):04b}": float(v) for c, v in zip(codes, values, strict=True)})
assert values.max() == 6

# %% [markdown]
# ## A scale per block
#
# NVFP4 gives sixteen codes an E4M3 scale and a tensor a float32 one, MXFP4 thirty-two codes a power of two: 4.5 and
# 4.25 bits a weight. Here is one block of each, as stored and as read back.

# %%
row = jnp.asarray([[0.11, -0.03, 0.4, 0.9, -1.7, 0.0, 0.25, 2.9] * 4])
for name in ("nvfp4", "mxfp4"):
    packed = formats.quantize(row, name)
    print(name, "codes", formats.unpack(packed.codes)[0, :8], "scales", packed.scales[0])
    print("      reads", np.round(np.asarray(formats.dequantize(packed))[0, :8], 3))

# %% [markdown]
# ## Where the error goes
#
# Relative error of 256 by 1024 weights. A block's largest entry decides the step of all its neighbours, so heavy tails
# cost MXFP4, whose blocks are long and whose scales are coarse. Rotating by a 16-point Hadamard transform (the last
# column, with NVFP4) spreads an outlier over its block. It does not lower this error: a large entry has the smallest
# relative error in its own block already.

# %%
keys = jax.random.split(jax.random.key(0), 3)
tensors = {
    "normal": jax.random.normal(keys[0], (256, 1024)),
    "Student's t, 3 degrees": jax.random.t(keys[1], 3.0, (256, 1024)),
    "normal, 1 % times 20": jax.random.normal(keys[2], (256, 1024))
    * jnp.where(jnp.arange(1024) % 100 == 0, 20.0, 1.0)[None],
}


def relative_error(x, name, rotate=False):
    y = formats.block_hadamard(x, 16) if rotate else x
    back = formats.dequantize(formats.quantize(y, name))
    back = formats.inverse_block_hadamard(back, 16) if rotate else back
    return float(jnp.linalg.norm(back - x) / jnp.linalg.norm(x))


print(
    f"{'':24s}"
    + "".join(f"{n:>12s}" for n in ("mxfp8_e4m3", "nvfp4", "nvfp4_46", "mxfp4", "rotated"))
)
for title, x in tensors.items():
    errors = [relative_error(x, n) for n in ("mxfp8_e4m3", "nvfp4", "nvfp4_46", "mxfp4")]
    errors.append(relative_error(x, "nvfp4", rotate=True))
    print(f"{title:24s}" + "".join(f"{e:12.4f}" for e in errors))
    assert errors[0] < errors[1] < errors[3]  # eight bits; then a finer scale before a coarser one

# %% [markdown]
# ## Rounding at random
#
# To the nearest code, a value between two codes is always wrong in the same direction. Stochastic rounding is wrong
# more often and right on average, which is why gradients are rounded that way.

# %%
x = jnp.tile(jnp.asarray([6.0] + [0.7] * 15), (4096, 1))  # 0.7 lies between 0.5 and 1
nearest = formats.dequantize(formats.quantize(x, "nvfp4"))[:, 1:]
random = formats.dequantize(formats.quantize(x, "nvfp4", key=jax.random.key(5)))[:, 1:]
print(f"mean of 0.7: nearest {nearest.mean():.4f}, stochastic {random.mean():.4f}")
assert abs(random.mean() - 0.7) < 0.005 < abs(nearest.mean() - 0.7)

# %% [markdown]
# ## Training through it
#
# Quantization-aware training computes with rounded weights and sends the gradient to the master weights as if nothing
# had been rounded (the straight-through estimator). A regression with fewer examples than weights has many solutions;
# rounding the first one found spoils it, and training through the rounding finds one that survives.

# %%
truth = jax.random.normal(jax.random.key(7), (8, 256))
inputs = jax.random.normal(jax.random.key(8), (32, 256))
targets = inputs @ truth.T


def rounded(w):
    return w + jax.lax.stop_gradient(formats.dequantize(formats.quantize(w, "nvfp4")) - w)


def loss(w, through):
    return jnp.mean((inputs @ (rounded(w) if through else w).T - targets) ** 2)


def fit(start, through, rate, steps=400):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(jax.grad(loss)(w, through), state)
        return (optax.apply_updates(w, updates), state), loss(w, True)

    (w, _), curve = jax.lax.scan(step, (start, optimizer.init(start)), None, steps)
    return w, curve


plain, plain_curve = fit(jnp.zeros_like(truth), False, 0.05)
aware, aware_curve = fit(plain, True, 0.001)  # goes on from there, at a lower rate
print(
    f"rounded afterwards {loss(plain, True):.4f}, trained through rounding {loss(aware, True):.4f}"
)
assert loss(aware, True) < loss(plain, True) / 2
figure, axes = plt.subplots(figsize=(6, 3))
steps = np.arange(400)
axes.semilogy(steps, plain_curve, label="trained plain, rounded to evaluate")
axes.semilogy(400 + steps, aware_curve, label="then trained through the rounding")
axes.set(xlabel="step", ylabel="loss with NVFP4 weights")
axes.legend()
figure.tight_layout()

# %% [markdown]
# **Exercise.** Which is worse for MXFP4: a block maximum just below or just above a power of two? Try the rules
# `floor`, `rceil`, `even` and `ceil` (`formats.quantize(x, "mxfp4", rule=...)`) on both.
#
# **Another.** With 512 examples of 64 inputs there is one solution, and training through the rounding ends worse than
# rounding to the nearest, at every learning rate tried: weights between two codes go back and forth. Look at
# `quant/oscillation.py` for what is done about it.
