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
# # Reading a baseline card
#
# What a committed result holds, how to check it, and what may be said about two of them. Nothing is trained here.

# %%
import moelab

moelab.prepare()

import matplotlib.pyplot as plt
import numpy as np

from moelab.report import baseline_checks, baselines, card, paired, statistics

# %% [markdown]
# ## What there is
#
# `experiments/baselines/cards/FAMILY/ARM.json` has one card per seed, with the learning curve and without weights.

# %%
names = baselines.names()
print("\n".join(names))
arms = {name: baselines.load(baselines.find(name)) for name in names}

# %% [markdown]
# ## One card
#
# It names the command, the commit, the machine, the data by hash, and what came out. Its digest shows careless edits;
# `moelab verify` recomputes what can be recomputed, `moelab verify --rerun` trains again.

# %%
run = arms["routing/top_k"][0]
print(run.card["command"])
for key in ("created", "config_sha256", "seeds", "parameters"):
    print(f"{key:14s}", run.card[key])
print("data          ", run.card["data"]["sha256"][:16], "tokens", run.card["data"]["tokens"])
print(
    "evaluation    ",
    {d: round(b, 4) for d, b in run.card["evaluation"]["rows"][0]["bits_per_byte"].items()},
)
assert card.digest(run.card) == run.card["card_sha256"]
for name in names:
    assert baseline_checks.problems(baselines.find(name)) == []

# %% [markdown]
# ## Two arms
#
# Arms share seeds: the same initialisation and the same order of the data, so differences are taken seed by seed. All
# points are shown; five of them say little, and the smallest detectable effect says how little.

# %%
chosen = ("routing/top_k", "routing/sigmoid_bias")
by_seed = [
    {
        r.card["seeds"]["seed"]: r.card["evaluation"]["rows"][0]["bits_per_byte"]["all"]
        for r in arms[name]
    }
    for name in chosen
]
seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
a, b = ([side[s] for s in seeds] for side in by_seed)
t, flips = statistics.paired_t(a, b), paired.sign_flip(a, b)
print(f"{chosen[1]} minus {chosen[0]}: {t.mean:+.4f} [{t.low:+.4f}, {t.high:+.4f}], n={t.n}")
print("exact sign flips", flips)
sd = float(np.std(np.subtract(b, a), ddof=1))
print(f"detectable with power 0.8: {paired.detectable(sd, len(seeds)):.4f}")
figure, axes = plt.subplots(figsize=(5, 3))
axes.plot([0, 1], [a, b], "o-", alpha=0.6)
axes.set_xticks([0, 1], chosen)
axes.set(ylabel="bits per byte", title="one line per seed")
figure.tight_layout()

# %% [markdown]
# **Exercise.** How many seeds would an effect of 0.01 bits per byte want, given this noise? (`paired.detectable`)
