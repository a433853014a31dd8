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
# # Quickstart: a router, its load, a sparse layer, four bits
#
# Open with Jupyter (jupytext) or run as a script. Everything is a pure function of arrays; nothing is trained here.

# %%
import moelab

moelab.prepare()  # before jax: the CPU flag and the compilation cache

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moelab import balance, data, metrics, routers, routing, schema

# %% [markdown]
# ## Real tokens
#
# Five domains: English, French and Spanish encyclopedia text, Python code, verse (see DATA.md). The first build takes
# some seconds; after that it is read from the cache.

# %%
dataset = data.build(schema.Corpus(), schema.Bpe())
batch = data.train_batches(dataset, batch_size=16, length=128, seed=0)[0]
domains = [dataset.domains[i] for i in batch.domain_B]
print(domains[0], "|", dataset.tokenizer.decode(batch.token_BL[0, :24].tolist()))

# %% [markdown]
# ## Route them
#
# A router takes token vectors and returns a `Routing`: which token goes to which expert, with which weight.

# %%
num_experts, width = 16, 64
# Trained representations share a direction, and a shared direction is what makes a router favour some experts.
shared_1D = 0.8 * jax.random.normal(jax.random.key(3), (1, width))
table = shared_1D + jax.random.normal(jax.random.key(0), (dataset.tokenizer.vocab_size, width))
x_TD = table[batch.token_BL.reshape(-1)]
num_tokens = x_TD.shape[0]
inputs = routing.plain_inputs(num_tokens)._replace(
    token_id_T=jnp.asarray(batch.token_BL.reshape(-1)),
    sequence_T=jnp.arange(num_tokens, dtype=jnp.int32) // 128,
    domain_T=jnp.repeat(jnp.asarray(batch.domain_B), 128),
)
router = routers.make("top_k", num_experts=num_experts, k=2)
params = router.init(jax.random.key(1), x_TD, inputs)
routed = router.apply(params, x_TD, inputs)
load = routing.load(routed.expert_N, num_experts)
print("load per expert", np.asarray(load, int))
print(f"MaxVio {metrics.max_violation(load):.2f}  entropy {metrics.normalized_entropy(load):.3f}")
assert load.sum() == 2 * num_tokens  # dropless: every token reaches two experts

# %% [markdown]
# ## Balance them
#
# The loss-free bias moves once per step by the sign of each expert's load error; it selects and never enters a weight.

# %%
mechanism = balance.make("loss_free_bias", rate=0.003)
state = mechanism.init(router)
violation = []
for _ in range(80):
    routed = router.apply(params, x_TD, inputs, mechanism.selection_bias(state))
    violation.append(float(metrics.max_violation(routing.load(routed.expert_N, num_experts))))
    state = mechanism.update(state, mechanism.observe(routed, state, router), router)
assert violation[-1] < violation[0] / 2

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.bar(range(num_experts), load, label="before", alpha=0.5)
left.bar(range(num_experts), routing.load(routed.expert_N, num_experts), label="after", alpha=0.5)
left.set(xlabel="expert", ylabel="assignments")
left.legend()
right.plot(violation)
right.set(xlabel="bias updates", ylabel="MaxVio", ylim=(0, None))
figure.tight_layout()

# %% [markdown]
# ## Four bits
#
# NVFP4: sixteen E2M1 codes share one E4M3 scale, and a tensor one float32 scale: 4.5 bits per weight.

# %%
from pallas_kernels import formats

weight = jax.random.normal(jax.random.key(2), (512, 256)) * 0.02
for name in ("mxfp8_e4m3", "nvfp4", "mxfp4"):
    packed = formats.quantize(weight, name)
    error = jnp.linalg.norm(formats.dequantize(packed) - weight) / jnp.linalg.norm(weight)
    bits = 8 * formats.nbytes(packed) / weight.size
    print(f"{name:11s} {bits:.2f} bits per weight, relative error {error:.4f}")
    assert error < 0.13

# %% [markdown]
# **Exercise.** Make the kernel of the router ten times larger (`init_scale=10`). What happens to the entropy of its
# scores, and to MaxVio? Which balancing mechanism of `moelab/balance/` would you reach for?
