"""Loss-free balancing: Wang et al. (2408.15664, algorithm 1): b_i += rate * sign(mean N - N_i), the
counts over the whole optimizer step.

zero_mean takes the mean of the step off, as torchtitan does; that keeps the bias's mean where it
was.
"""

from types import SimpleNamespace

import numpy as np

DEFAULTS = dict(rate=0.001, zero_mean=False)

CASES = [
    dict(fields=dict(rate=0.001), router=dict(kind="top_k", k=2, score="sigmoid")),
    dict(fields=dict(rate=0.1, zero_mean=True), router=dict(kind="top_k", k=2)),
    dict(fields=dict(rate=0.01), router=dict(kind="top_k", k=1)),
    dict(
        fields=dict(rate=0.02, zero_mean=True),
        router=dict(kind="group_limited", k=2, num_groups=2, groups_per_token=1),
    ),
]


def update(state, batches, fields):
    fields = DEFAULTS | fields
    bias = state["bias_C"]
    columns = len(bias)
    n = np.zeros(columns)
    for aux in batches:
        choice = aux.choice[aux.mask]
        n += np.bincount(choice[choice < columns], minlength=columns)
    step = fields["rate"] * np.sign(n.mean() - n)
    if fields["zero_mean"]:
        step = step - step.mean()
    return {"bias_C": bias + step}


def example():
    # N = 3 1 1 1 (the last token is padding), mean 1.5: signs -1 1 1 1, times .02.
    # Their mean, .01, is taken off: -.03 .01 .01 .01
    prob = np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.2, 0.3, 0.1], [0.4, 0.2, 0.1, 0.3], [0.25] * 4])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0, 1], [0, 2], [0, 3], [4, 4]]),
        weight=np.array(
            [[4 / 7, 3 / 7, 0, 0], [4 / 7, 0, 3 / 7, 0], [4 / 7, 0, 0, 3 / 7], [0, 0, 0, 0]]
        ),
        mask=np.array([True, True, True, False]),
        sequence=np.array([0, 0, 1, 1]),
        chance=None,
        num_experts=4,
        k=2,
    )
    return dict(
        aux=aux,
        fields=dict(rate=0.02, zero_mean=True),
        state={"bias_C": np.array([0.04, 0.0, 0.0, -0.04])},
        updated={"bias_C": np.array([0.01, 0.01, 0.01, -0.03])},
    )
