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
# # Data quality
#
# Put dirt into clean text and keep the truth; let filters judge; ask which dirt each of them sees. On a few hundred
# short documents of our own, so that it takes seconds; `bench/filtering.py` does the same with the whole corpus.

# %%
import moelab

moelab.prepare()

import json
import pathlib
import random
import tempfile

import matplotlib.pyplot as plt
import numpy as np

from moelab import data, schema
from moelab.data import corpus

# %% [markdown]
# ## Clean text
#
# The beginnings of English articles, as JSON lines: users' own text comes in by the same door.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
entries = [(key, e) for key, e in corpus.wiki_entries("en-us") if len(e["extract"]) > 400]
random.Random(0).shuffle(entries)
lines = [json.dumps({"id": key, "text": entry["extract"][:1500]}) for key, entry in entries[:600]]
(folder / "wiki.jsonl").write_text("\n".join(lines))

# %% [markdown]
# ## Dirt, with the truth kept
#
# A fifth of the training documents gets a third of its words replaced, another fifth is shuffled, and a tenth of the
# text is documents that stand there three times. Evaluation splits stay clean.

# %%
INJECT = (
    "token_noise share=0.2 rate=0.3",
    "word_shuffle share=0.2",
    "duplicate share=0.1 copies=3",
)
FILTERS = ("exact", "minhash", "gopher_quality", "classifier", "perplexity_ngram")
section = schema.JsonLines(path=str(folder / "wiki.jsonl"), inject=INJECT, filter=FILTERS)
table, outcome = data.score(section, schema.Byte(), cache=folder / "cache")
kinds = dict(zip(*np.unique(np.array(table.kinds)[table.kind_N], return_counts=True), strict=True))
print({str(k): int(v) for k, v in kinds.items()})

# %% [markdown]
# ## What each filter finds
#
# Recall by kind of dirt: the share of it that a filter would remove at its setting, beside the share of clean text
# that goes too. A classifier on words and pairs of words sees shuffled words a little better than replaced ones.

# %%
kinds = [kind for kind in table.kinds if kind != "clean"]
recall = np.array(
    [[row["kinds"][k]["removed"] / row["kinds"][k]["documents"] for k in kinds] for row in outcome]
)
print(f"{'':18s}" + "".join(f"{kind:>14s}" for kind in (*kinds, "clean")) + f"{'precision':>11s}")
for row, line in zip(outcome, recall, strict=True):
    shown = "".join(f"{share:14.2f}" for share in (*line, row["clean_removed"] or 0))
    precision = "none removed" if row["precision"] is None else f"{row['precision']:.2f}"
    print(f"{row['filter']:18s}{shown}{precision:>11s}")

figure, ax = plt.subplots(figsize=(6, 3))
ax.imshow(recall, cmap="viridis", vmin=0, vmax=1)
ax.set_xticks(range(len(kinds)), kinds)
ax.set_yticks(range(len(outcome)), [row["filter"] for row in outcome])
ax.set(title="recall")
figure.tight_layout()

# %% [markdown]
# ## Scores rank even where a threshold does not cut
#
# The area under the curve: how often a dirty document scores below a clean one; 0.5 is chance.

# %%
for row in outcome:
    shown = {kind: row["kinds"][kind]["auc"] for kind in kinds}
    print(f"{row['filter']:18s}", {k: None if v is None else round(v, 2) for k, v in shown.items()})

# %% [markdown]
# **Exercise.** Filter first by `perplexity_ngram`, then by `exact`, and the other way round. Whose precision changes,
# and why? To train on the result: `moelab run --config=experiments/data/filtered.py`.
