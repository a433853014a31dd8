"""Quantile balancing: Su Jianlin (kexue.fm, archives/11619), from a summary of it, not re-read.

alpha_t is the (k+1)-th largest of s + b, beta_i the (1 - k/C)-quantile over the tokens of s_i -
alpha, and -beta the new bias: then column i is chosen by a share k/C of the tokens. The moving
average and the subtracted mean are additions of later users; so are the estimators "local_mean"
(the mean of the micro-batches' quantiles) and "histogram".
"""

from types import SimpleNamespace

import numpy as np

DEFAULTS = dict(rate=1.0, estimator="exact", bins=1000)

CASES = [
    dict(fields={}, router=dict(kind="top_k", k=2, score="sigmoid")),
    dict(fields=dict(rate=0.3), router=dict(kind="top_k", k=2)),
    dict(fields=dict(estimator="local_mean"), router=dict(kind="top_k", k=2, score="sigmoid")),
    dict(
        fields=dict(estimator="local_mean", rate=0.5),
        router=dict(kind="top_k", k=1, score="sigmoid"),
    ),
    dict(
        fields=dict(estimator="histogram"),
        router=dict(kind="top_k", k=2, score="sigmoid"),
    ),
    dict(
        fields=dict(estimator="histogram", bins=200, rate=0.5),
        router=dict(kind="top_k", k=3, score="sigmoid"),
    ),
]


def excess(aux, bias):
    """rank - alpha of the valid tokens."""
    rank = aux.rank[aux.mask]
    k = round(float(aux.k))
    alpha = np.sort(rank + bias, axis=1)[:, ::-1][:, k]
    return rank - alpha[:, None]


def histogram_quantile(values, q, bins):
    """The q-quantile of some numbers of which only their counts in equal bins on [-1, 1] are
    known."""
    width = 2 / bins
    index = np.clip(np.floor((values + 1) * bins / 2).astype(int), 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    target = q * len(values)
    before = 0
    for i in range(bins):
        if count[i] > 0 and before + count[i] >= target:
            return -1 + width * (i + (target - before) / count[i])
        before += count[i]
    return 1.0


def update(state, batches, fields):
    fields = DEFAULTS | fields
    bias = state["bias_C"]
    columns = len(bias)
    q = 1 - batches[0].k / columns
    parts = [excess(aux, bias) for aux in batches if aux.mask.any()]
    if not parts:
        return {"bias_C": bias}
    if fields["estimator"] == "local_mean":
        quantiles = [np.quantile(part, q, axis=0) for part in parts]
        beta = np.average(quantiles, axis=0, weights=[len(part) for part in parts])
    elif fields["estimator"] == "histogram":
        together = np.concatenate(parts)
        beta = np.array([histogram_quantile(column, q, fields["bins"]) for column in together.T])
    else:
        beta = np.quantile(np.concatenate(parts), q, axis=0)
    new = -beta + beta.mean()
    return {"bias_C": (1 - fields["rate"]) * bias + fields["rate"] * new}


def example():
    # k = 1 of 2: alpha is the lower of the two scores, .1 .2 .3 (padding left out),
    # the quantile is the median.
    # s - alpha: .8 .6 0 in column 0, medians .6;  0 0 .4 in column 1, median 0.
    # -beta = -.6 0, less its mean -.3: -.3 .3; half of the way from 0: -.15 .15
    prob = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0], [0], [1], [2]]),
        weight=np.array([[0.9, 0], [0.8, 0], [0, 0.7], [0, 0]]),
        mask=np.array([True, True, True, False]),
        sequence=np.array([0, 0, 1, 1]),
        chance=None,
        num_experts=2,
        k=1,
    )
    return dict(
        aux=aux,
        fields=dict(rate=0.5),
        state={"bias_C": np.zeros(2)},
        updated={"bias_C": np.array([-0.15, 0.15])},
    )
