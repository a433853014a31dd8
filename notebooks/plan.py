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
# # What 4-bit experts, NVLink and a new GPU really buy
#
# The claims, one plot each, by the planner: numpy alone, no GPU, no jax. `moelab plan claims` prints the same with
# every source.

# %%
import matplotlib.pyplot as plt
import numpy as np

from moelab.plan import claims, hardware, joint, named, plots, published, recipes, search
from moelab.plan.serving import Load

shared, found = claims.report()
print(shared.point)
for claim in found:
    print(f"{claim.verdict:18} {claim.claim}\n{'':18} {claim.because}\n")

# %% [markdown]
# ## One model, four systems
#
# Every point is the best layout and batch at its speed; shaded is the 80 % band.

# %%
model, load = published.find("deepseek_v3"), Load(8192, 1024)
systems = {"h200x8": "fp8", "b200x8": "fp8", "b200x8 ": "nvfp4", "gb200x72": "nvfp4"}
results = [
    search.search(model, recipes.named(precision), hardware.system(name), load)
    for name, precision in systems.items()
]
for color, result in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"], results, strict=False):
    front = result.front()
    user, rate = result.user[front], result.throughput[front]
    plt.plot(user, rate, "o-", ms=3, color=color, label=plots.name_of(result))
    plt.fill(
        np.concatenate([user / result.high[front], (user / result.low[front])[::-1]]),
        np.concatenate([rate / result.high[front], (rate / result.low[front])[::-1]]),
        color=color,
        alpha=0.12,
    )
plt.xscale("log"), plt.yscale("log")
plt.xlabel("tokens/s/user"), plt.ylabel("tokens/s/GPU"), plt.legend()
plt.title(f"{model.name}, {load.isl} in, {load.osl} out")
plt.show()

# %% [markdown]
# ## The claims, one plot each

# %%
for claim in found:
    if not claim.bars:
        continue
    labels, values = zip(*claim.bars, strict=True)
    plt.figure(figsize=(6, 0.9 + 0.35 * len(values)))
    plt.barh(labels[::-1], values[::-1])
    plt.title(f"{claim.claim}: {claim.verdict}", fontsize=9)
    plt.xlabel(claim.unit)
    plt.tight_layout()
    plt.show()

# %% [markdown]
# ## Quality beside cost, at one operating point
#
# What each format lost in moelab's own study, and what the planner says it gains. Weights alone, and weights and
# activations, are separate, as they must be.

# %%
rows = joint.rows(shared)
for row in rows:
    low, high = row["bits_per_byte"] - row["low"], row["high"] - row["bits_per_byte"]
    plt.errorbar(
        row["gain_over_fp8"],
        row["bits_per_byte"],
        yerr=[[low], [high]],
        fmt="o",
        label=row["label"],
    )
plt.xlabel("modelled throughput over FP8"), plt.ylabel("bits per byte more than float32")
plt.legend(), plt.show()

# %% [markdown]
# ## How far to trust it
#
# Published rates that are in no fit. `moelab plan validate` has the held-out rows (extra `plan-data`).

# %%
outcomes = named.outcomes()
measured = np.array([o.case.rate for o in outcomes])
predicted = np.array([o.rate for o in outcomes])
errors = [predicted - [o.low for o in outcomes], [o.high for o in outcomes] - predicted]
plt.errorbar(measured, predicted, yerr=errors, fmt="o", lw=0.7)
plt.plot([1e3, 3e4], [1e3, 3e4], "k:", lw=1)
plt.xscale("log"), plt.yscale("log")
plt.xlabel("measured output tokens/s/GPU"), plt.ylabel("predicted, 80 % band")
plt.show()
inside = np.mean([o.inside for o in outcomes])
print(f"{100 * inside:.0f} % within the band; median ratio {np.median(predicted / measured):.2f}")
