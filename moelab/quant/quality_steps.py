"""What the quality report measures on one batch: what the models saw, their outputs, their routes.

B sequences, L tokens, T = B*L tokens, D model width, V vocabulary, M MoE layers, N assignments, C columns of the
routers' scores.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moelab import model as model_lib
from moelab import step as step_lib

_LOGITS = 2**22  # of both models together in one chunk, at most


class Seen(NamedTuple):
    """What one model made of a batch.

    Attributes:
      hidden_TD: float vectors that the head multiplies.
      x_MTD: rows that enter the experts; None where they were not asked for.
      token_MN, expert_MN, weight_MN, choice_MN: of the routings, as in routing.Routing and its aux.
      prob_MTC: float32 scores, each row normalised.
    """

    hidden_TD: jax.Array
    x_MTD: jax.Array | None
    token_MN: jax.Array
    expert_MN: jax.Array
    weight_MN: jax.Array
    choice_MN: jax.Array
    prob_MTC: jax.Array


class Routes(NamedTuple):
    """Sums over valid tokens of how two models route, float32 per MoE layer.

    Attributes:
      both_M, chosen_M: assignments that both chose, and that the first chose.
      same_order_M: tokens whose slots all have the same expert.
      kl_M: KL(first || second) of the normalised scores, in nats.
      tokens: valid tokens.
    """

    both_M: jax.Array
    chosen_M: jax.Array
    same_order_M: jax.Array
    kl_M: jax.Array
    tokens: jax.Array


def make_seeing(model: model_lib.Transformer, *, rows: bool):
    """Returns a jitted (variables, batch) -> Seen.

    Args:
      model: as it is to be evaluated.
      rows: whether to keep the rows that enter the experts.
    """
    collections = ["calibration"] if rows else []

    @jax.jit
    def see(variables: dict, batch) -> Seen:
        inputs = model_lib.Inputs(batch.token_BL, batch.mask_BL, batch.domain_B)
        out, kept = model.apply(variables, inputs, train=False, trace=True, mutable=collections)
        layers = step_lib.in_block_order(out.reports)
        traces = [layer.trace for layer in layers]

        def stacked(get):
            return jnp.stack([get(trace) for trace in traces])

        return Seen(
            hidden_TD=out.hidden_BLD.reshape(batch.token_BL.size, -1),
            x_MTD=jnp.stack(_rows(kept["calibration"])) if rows else None,
            token_MN=stacked(lambda r: r.token_N),
            expert_MN=stacked(lambda r: r.expert_N),
            weight_MN=stacked(lambda r: r.weight_N),
            choice_MN=stacked(lambda r: r.aux.choice_N),
            prob_MTC=stacked(lambda r: r.aux.prob_TC),
        )

    return see


def _rows(kept: dict) -> list[jax.Array]:
    """The sown rows per MoE layer, in the order of the blocks."""
    segments = sorted(kept, key=lambda name: int(name.split("_")[1]))
    return step_lib.in_block_order(
        tuple(
            {block: kept[name][block]["moe"]["x_TD"][0] for block in kept[name]}
            for name in segments
        )
    )


@jax.jit
def outputs(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array], target_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares two models' distributions of the next token, a chunk of tokens at a time.

    KL(first || second) = sum over the vocabulary of p (log p - log q)

    Args:
      first, second: (hidden_TD, head_VD) of each.
      target_T: int32.

    Returns:
      float32 (T,) each: nats of the target under the first and the second, and the divergence in nats, at least 0.
    """
    num_tokens, vocab_size = target_T.size, first[1].shape[0]
    chunk = max(1, min(num_tokens, _LOGITS // (2 * vocab_size)))
    padding = -num_tokens % chunk

    def chunks(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, padding),) + ((0, 0),) * (a.ndim - 1))
        return padded.reshape(-1, chunk, *a.shape[1:])

    def compare(part):
        log_p_CV, log_q_CV = (
            _log_probabilities(hidden, head)
            for hidden, (_, head) in zip(part[:2], (first, second), strict=True)
        )
        own = part[2][:, None]
        nats = (-jnp.take_along_axis(a, own, axis=1)[:, 0] for a in (log_p_CV, log_q_CV))
        kl_C = jnp.sum(jnp.exp(log_p_CV) * (log_p_CV - log_q_CV), axis=1)
        return (*nats, jnp.maximum(kl_C, 0))

    found = lax.map(compare, (chunks(first[0]), chunks(second[0]), chunks(target_T)))
    return tuple(a.reshape(-1)[:num_tokens] for a in found)


def _log_probabilities(hidden_CD: jax.Array, head_VD: jax.Array) -> jax.Array:
    logit_CV = lax.dot_general(
        hidden_CD,
        head_VD.astype(hidden_CD.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return jax.nn.log_softmax(logit_CV, axis=-1)


@functools.partial(jax.jit, static_argnames=("slots",))
def routes(first: Seen, second: Seen, mask_T: jax.Array, slots: int | None) -> Routes:
    """Compares the routings of two models on the same tokens.

    Args:
      first, second: what they made of the batch.
      mask_T: bool, valid tokens.
      slots: assignments per token of token choice, in their order; None where experts choose: no order then.
    """

    def one(token_N, choice_N, prob_TC, other_token_N, other_choice_N, other_prob_TC):
        num_columns = prob_TC.shape[1]
        a_TC = _chosen(token_N, choice_N, mask_T.size, num_columns)
        b_TC = _chosen(other_token_N, other_choice_N, mask_T.size, num_columns)
        same = jnp.zeros((), jnp.float32)
        if slots is not None:
            same_N = (choice_N == other_choice_N).reshape(-1, slots)
            same = jnp.sum(jnp.all(same_N, axis=1) & mask_T).astype(jnp.float32)
        kl_T = jnp.sum(_divergence(prob_TC, other_prob_TC), axis=1)
        return (
            jnp.sum(a_TC & b_TC).astype(jnp.float32),
            jnp.sum(a_TC).astype(jnp.float32),
            same,
            jnp.sum(jnp.where(mask_T, kl_T, 0)),
        )

    sides = ((s.token_MN, s.choice_MN, s.prob_MTC) for s in (first, second))
    return Routes(*jax.vmap(one)(*next(sides), *next(sides)), jnp.sum(mask_T).astype(jnp.float32))


def _chosen(token_N, choice_N, num_tokens: int, num_columns: int) -> jax.Array:
    """Marks each token's columns; padding chose none."""
    hit_TC = jnp.zeros((num_tokens, num_columns + 1), bool).at[token_N, choice_N].set(True)
    return hit_TC[:, :num_columns]


def _divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """p (log p - log q), 0 where p is; a q of 0 counts as the smallest normal number."""
    tiny = jnp.finfo(jnp.float32).tiny
    log = jnp.log(jnp.maximum(p, tiny)) - jnp.log(jnp.maximum(q, tiny))
    return jnp.where(p > 0, p * log, 0)
