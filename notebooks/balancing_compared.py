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
# # Balancing, compared
#
# Four ways to even out the load of a router that starts lopsided, on the same tokens and without any experts: what a
# loss does by gradient, what controllers do to a selection bias, and how fast. Then the published table of whole
# trainings.

# %%
import moelab

moelab.prepare()

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from moelab import balance, metrics, routers, routing
from moelab.report import arms, baselines

# %% [markdown]
# ## Lopsided tokens
#
# Token vectors that share a direction make a router prefer the experts that like this direction.

# %%
num_tokens, width, num_experts, k = 2048, 64, 16, 2
shared_1D = 0.8 * jax.random.normal(jax.random.key(3), (1, width))
x_TD = shared_1D + jax.random.normal(jax.random.key(0), (num_tokens, width))
inputs = routing.plain_inputs(num_tokens)
router = routers.make("top_k", num_experts=num_experts, k=k, score="sigmoid")
start = router.init(jax.random.key(1), x_TD, inputs)


def violation(routed):
    return metrics.max_violation(np.asarray(routing.load(routed.expert_N, num_experts)))


print(f"MaxVio before: {violation(router.apply(start, x_TD, inputs)):.2f}")

# %% [markdown]
# ## One step function for all
#
# A mechanism is a loss, an update of its state, or both. Losses move the router's weights, here by Adam on the
# balancing loss alone; controllers move a bias that selects and never enters a weight.


# %%
def balanced(kind, steps=60, **fields):
    mechanism = balance.make(kind, **fields)
    optimizer = optax.adam(3e-3)
    params, state = start, mechanism.init(router)
    moments = optimizer.init(params)

    @jax.jit
    def step(params, moments, state):
        def loss(params):
            routed = router.apply(params, x_TD, inputs, mechanism.selection_bias(state))
            return mechanism.weight(state) * mechanism.loss(routed, state, router), routed

        grads, routed = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments)
        total = mechanism.observe(routed, state, router) | mechanism.rows(routed, state, router)
        return (
            optax.apply_updates(params, updates),
            moments,
            mechanism.update(state, total, router),
            routed,
        )

    curve = []
    for _ in range(steps):
        params, moments, state, routed = step(params, moments, state)
        curve.append(violation(routed))
    return curve


curves = {
    "switch_loss": balanced("switch_loss", coefficient=0.01),
    "loss_free_bias": balanced("loss_free_bias", rate=0.01),
    "quantile_bias, exact": balanced("quantile_bias", rate=1.0, estimator="exact"),
    "quantile_bias, average": balanced("quantile_bias", rate=0.2, estimator="exact"),
}
figure, axes = plt.subplots(figsize=(6, 3))
for name, curve in curves.items():
    axes.plot(curve, label=name)
    print(f"{name:22s} MaxVio {curve[0]:.2f} -> {curve[-1]:.2f}")
    assert curve[-1] < curve[0]
axes.set(xlabel="steps", ylabel="MaxVio", ylim=(0, None))
axes.legend()
figure.tight_layout()

# %% [markdown]
# An exact quantile balances at once what it has measured; a sign update takes a number of steps; a loss pulls against
# whatever else the router learns (here nothing), so its speed is that of the optimizer.
#
# ## Whole trainings
#
# The baseline family `balancing`: eight seeds of each arm, against the arm without any mechanism, paired by seed.

# %%
names = [name for name in baselines.names() if name.startswith("balancing/")]
runs = [run for name in names for run in baselines.load(baselines.find(name))]
compared = arms.compare(arms.group(runs), "none")
for name, found in compared.differences.items():
    print(
        f"{name:20s} {found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}] bits per byte, n={found.n}"
    )

# %% [markdown]
# **Exercise.** Give the Switch loss a coefficient of 1. Is the load better? Now add a task loss of your own to `loss`
# and look again.
