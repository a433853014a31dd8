"""Batch prioritised routing: under a capacity, the tokens with the largest first weight keep their place.

    order tokens by their best score, then fill the experts' buffers first choice by first choice

V-MoE, Riquelme et al., arXiv:2106.05974. Selection and weights are `top_k`'s; what differs
is whom `moe.capacity_factor` drops. Not causal: whether a token is dropped depends on the scores of later tokens.
"""

from __future__ import annotations

from moelab.routers import top_k


class Router(top_k.Router):
    """Selects k experts per token by score; the most certain tokens are served first."""

    causal = False
    reason = "a token's place in an expert's buffer depends on the scores of later tokens"
    competes = True
    by_score = True


validate = top_k.validate
