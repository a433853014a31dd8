"""Noisy top-k gating: Shazeer et al. (1701.06538, eq. 3-5; the chance of being chosen: appendix A,
eq. 8-9).
"""

import numpy as np
from scipy.special import softmax
from scipy.stats import norm

DEFAULTS = dict(k=2)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields={}, train=False, bias=False),
    dict(num_experts=8, fields=dict(k=1), train=True, bias=False),
    dict(num_experts=6, fields=dict(k=4), train=True, bias=False),
]


def noisy_logits(x, params, case, given):
    """H(x), and the standard deviation of its noise."""
    z = x @ params["kernel"]
    deviation = np.logaddexp(0.0, x @ params["noise_kernel"])  # softplus
    if not case["train"]:
        return z, deviation
    return z + given.normal(z.shape[1]) * deviation, deviation


def route(x, params, case, given):
    k = (DEFAULTS | case["fields"])["k"]
    h, _ = noisy_logits(x, params, case, given)
    chosen = np.zeros(h.shape, bool)
    weight = np.zeros(h.shape)
    for t in np.flatnonzero(given.mask):
        selected = np.argsort(-h[t], kind="stable")[:k]
        chosen[t, selected] = True
        weight[t, selected] = softmax(h[t, selected])
    return chosen, weight


def chance(x, params, case, given):
    """P(x, i): that expert i is chosen if only its own noise is drawn again. 0 for padding.

    The threshold is the k-th largest of the other experts' noisy logits; with k = E there is none
    and P is 1.
    """
    k = (DEFAULTS | case["fields"])["k"]
    z = x @ params["kernel"]
    h, deviation = noisy_logits(x, params, case, given)
    p = np.zeros(h.shape)
    for t in np.flatnonzero(given.mask):
        for i in range(h.shape[1]):
            others = np.sort(np.delete(h[t], i))[::-1]
            threshold = others[k - 1] if k <= len(others) else -np.inf
            p[t, i] = norm.cdf((z[t, i] - threshold) / deviation[t, i])
    return p


def example():
    noise = np.array([[0.0, 0.0, 0.0], [-3.0, 0.0, 0.5]])
    one = np.log(np.e - 1)  # softplus(one) = 1
    # token 0: H = 2 1 0     -> 0 and 1, softmax of 2 and 1: 1/(1+e^-1) and 1/(1+e)
    # token 1: H = -1 1 .5   -> 1 and 2, softmax of 1 and .5: 1/(1+e^-.5) and 1/(1+e^.5)
    # chance, threshold = second largest of the two others, which is their smaller one:
    # token 0: thresholds 0 0 1    -> Phi(2-0)   Phi(1-0)    Phi(0-1)
    # token 1: thresholds .5 -1 -1 -> Phi(2-.5)  Phi(1+1)    Phi(0+1)
    return dict(
        x=np.ones((2, 1)),
        params=dict(kernel=np.array([[2.0, 1.0, 0.0]]), noise_kernel=np.array([[one, one, one]])),
        case=dict(num_experts=3, fields=dict(k=2), train=True, bias=False),
        given=dict(normal=lambda width: noise, mask=np.array([True, True])),
        chosen=np.array([[1, 1, 0], [0, 1, 1]], bool),
        weight=np.array(
            [
                [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0],
                [0, 1 / (1 + np.exp(-0.5)), 1 / (1 + np.exp(0.5))],
            ]
        ),
        # from a table of the normal distribution
        chance=np.array(
            [
                [0.9772498681, 0.8413447461, 0.1586552539],
                [0.9331927987, 0.9772498681, 0.8413447461],
            ]
        ),
    )
