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
# # Routing, seen
#
# Train a small sparse model for a minute, then look: how evenly the experts are used, whether they follow the text's
# domain, and how to add a router of one's own in twenty lines.

# %%
import moelab

moelab.prepare()

import pathlib
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moelab import diagnostics, metrics, routers, routes, routing
from moelab import router as contract

# %% [markdown]
# ## A run
#
# A minute of the ablation model: 2 of 4 layers, 8 experts. Too short to say anything about quality; long enough to
# look.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
loaded = moelab.load_config(
    "routing/top_k",
    [
        "--config.model.num_layers=2",
        "--config.moe.num_experts=8",
        "--config.train.num_steps=40",
        "--config.evaluation.tokens_per_domain=4096",
    ],
)
result = moelab.run(loaded.config, folder / "run")
row = result.card["evaluation"]["rows"][0]
print(
    f"bits per byte {row['bits_per_byte']['all']:.3f}, MaxVio of the layers {np.round(row['max_violation'], 2)}"
)

# %% [markdown]
# ## Where every token went
#
# A trace holds the experts of every token of the test split, with their domains.

# %%
trace = routes.record(folder / "run")
share_MGC = diagnostics.load_by_domain(trace)
found = diagnostics.specialisation(trace)
figure, axes = plt.subplots(1, len(share_MGC), figsize=(9, 2.6), squeeze=False)
for layer, (ax, share_GC) in enumerate(zip(axes[0], share_MGC, strict=True)):
    ax.imshow(share_GC, cmap="viridis", vmin=0)
    ax.set(title=f"layer {layer}", xlabel="expert")
    ax.set_yticks(range(len(trace.domains)), trace.domains)
figure.tight_layout()

# %% [markdown]
# Do experts follow the domain? The mutual information of expert and domain, beside what it would be if documents'
# domains were dealt at random (a share above zero is expected by chance, so the null is what to compare with).

# %%
for name, value in found._asdict().items():
    print(f"{name:20s}", np.round(np.asarray(value), 4).tolist() if np.ndim(value) else value)

# %% [markdown]
# ## A router in twenty lines
#
# A file in `moelab/routers/` with a class `Router` is a router. This one measures the distance to each expert's centre
# and takes the nearest two: scores are minus squared distances.


# %%
class Nearest(contract.Router):
    """Selects the k experts with the nearest centres."""

    @nn.compact
    def __call__(self, x_TD, inputs, selection_bias_C=None):
        init = nn.initializers.normal(1.0)
        centre_CD = self.param("centre", init, (self.num_columns, x_TD.shape[1]), jnp.float32)
        x_TD = x_TD.astype(jnp.float32)
        square_TC = jnp.sum((x_TD[:, None, :] - centre_CD[None]) ** 2, axis=-1)
        logit_TC = -square_TC / x_TD.shape[1] ** 0.5
        prob_TC = jax.nn.softmax(logit_TC)
        column_TK = self.choose(logit_TC, selection_bias_C, inputs)
        weight_TK = jnp.take_along_axis(prob_TC, column_TK, axis=1)
        weight_TK = weight_TK / jnp.sum(weight_TK, axis=1, keepdims=True)
        scores = routing.Scores(logit_TC, prob_TC, logit_TC)
        return routing.from_token_choice(column_TK, weight_TK, scores, inputs, self.num_experts)


x_TD = jax.random.normal(jax.random.key(0), (512, 32))
inputs = routing.plain_inputs(512)
for made in (routers.make("top_k", num_experts=8, k=2), Nearest(num_experts=8, k=2)):
    params = made.init(jax.random.key(1), x_TD, inputs)
    routed = made.apply(params, x_TD, inputs)
    load_E = routing.load(routed.expert_N, 8)
    assert load_E.sum() == 2 * 512
    print(
        f"{type(made).__module__:24s} MaxVio {metrics.max_violation(load_E):.2f}",
        np.asarray(load_E, int),
    )

# %% [markdown]
# To train with it: save the class as `moelab/routers/nearest.py` (named `Router`), set `--config.router.kind=nearest`,
# and write its numpy transcription for the shared tests.
#
# **Exercise.** Record the same run with `routing/oracle`: its domain information is the most that any router can have.
