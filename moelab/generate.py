"""Sampling of tokens, and the loop that continues a prompt token by token.

B sequences, L prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moelab import evaluate
from moelab import model as model_lib
from moelab.errors import UserError


def sample(
    logit_BV: jax.Array, key: jax.Array, *, temperature: float = 1.0, top_p: float = 1.0
) -> jax.Array:
    """Draws one token per sequence from the nucleus of softmax(logits / temperature).

    Sequence b draws with the noise of place b: the same whatever else is in the batch.

    Args:
      logit_BV: floating point; -inf forbids a token.
      key: PRNG key, not used by greedy sampling.
      temperature: >= 0; 0 takes the most likely token, of several the lowest id.
      top_p: in (0, 1]; mass of the nucleus (see `nucleus`), of the distribution after the temperature.

    Returns:
      token_B: int32; -1 where no distribution is defined (a NaN or +inf, or every token forbidden).

    Raises:
      ValueError: temperature or top_p is out of range.

    Reference: arXiv:1904.09751, section 3.1 (nucleus sampling).
    """
    _check(logit_BV, temperature, top_p)
    logit_BV = logit_BV.astype(jnp.float32)
    largest_B = jnp.max(logit_BV, axis=1, keepdims=True)
    # isnan is asked of each logit: a maximum may lose a NaN on some backends.
    bad_B = jnp.any(jnp.isnan(logit_BV), axis=1) | ~jnp.isfinite(largest_B[:, 0])
    if temperature == 0:
        token_B = jnp.argmax(logit_BV, axis=1)
    else:
        # Less the maximum first, so that no temperature, however small, overflows.
        shifted_BV = logit_BV - largest_B
        shifted_BV = jnp.where(shifted_BV == 0, 0.0, shifted_BV / temperature)
        if top_p < 1:
            shifted_BV = jnp.where(nucleus(jax.nn.softmax(shifted_BV), top_p), shifted_BV, -jnp.inf)
        token_B = jax.random.categorical(key, shifted_BV)
    return jnp.where(bad_B, -1, token_B).astype(jnp.int32)


def nucleus(probability_BV: jax.Array, top_p: float) -> jax.Array:
    """Finds the smallest set of most likely tokens whose mass is at least `top_p`.

    A token is in it while the mass of those before it, in order of falling probability, is below top_p; of equally
    likely tokens the lower id comes first. Sums are float32, in that order.

    >>> nucleus(jnp.array([[0.25, 0.5, 0.125, 0.125]]), 0.8).tolist()
    [[True, True, True, False]]

    Args:
      probability_BV: float32, rows sum to 1.
      top_p: in (0, 1].

    Returns:
      bool_BV, at least one token true per row.
    """
    order_BV = jnp.argsort(probability_BV, axis=1, descending=True, stable=True)
    ranked_BV = jnp.take_along_axis(probability_BV, order_BV, axis=1)
    before_BV = jnp.cumsum(ranked_BV, axis=1) - ranked_BV
    inside_BV = before_BV < top_p  # nothing is before the first, exactly: it is always in
    return jnp.put_along_axis(jnp.zeros_like(inside_BV), order_BV, inside_BV, 1, inplace=False)


def generate(
    step: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    cache: Any,
    prompt_BL: jax.Array,
    key: jax.Array,
    *,
    num_tokens: int,
    end_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> jax.Array:
    """Continues prompts with a key-value cache; pure, so that it can be jitted as a whole.

    Args:
      step: (cache, token_BL) -> (logit_BV of the token after the last, cache): called with the prompt, then with one
        token at a time.
      cache: pytree that `step` passes on; long enough for the prompt and num_tokens - 1 more.
      prompt_BL: int32, L >= 1; all prompts of a batch are equally long.
      key: PRNG key; new token n draws with fold_in(key, n).
      num_tokens: N >= 1.
      end_id: a sequence that has drawn it goes on with it. -1: none does (but one without a distribution).
      temperature, top_p: see `sample`.

    Returns:
      token_BN: int32.

    Raises:
      ValueError: an empty prompt, num_tokens < 1, or temperature or top_p out of range.
    """
    if prompt_BL.ndim != 2 or prompt_BL.shape[1] < 1 or num_tokens < 1:
        raise ValueError(
            f"generate needs prompts [B, L >= 1] and num_tokens >= 1, got {prompt_BL.shape} and {num_tokens}"
        )

    def draw(logit_BV: jax.Array, n: jax.Array | int) -> jax.Array:
        key_n = jax.random.fold_in(key, n)
        return sample(logit_BV, key_n, temperature=temperature, top_p=top_p)

    def extend(carry: tuple[Any, jax.Array], n: jax.Array):
        cache, token_B = carry
        logit_BV, cache = step(cache, token_B[:, None])
        token_B = jnp.where(token_B == end_id, end_id, draw(logit_BV, n))
        return (cache, token_B), token_B

    logit_BV, cache = step(cache, prompt_BL)
    first_B = draw(logit_BV, 0)
    _, token_NB = jax.lax.scan(extend, (cache, first_B), jnp.arange(1, num_tokens))
    return jnp.concatenate([first_B[:, None], token_NB.T], axis=1)


def _check(logit_BV: jax.Array, temperature: float, top_p: float) -> None:
    if logit_BV.ndim != 2:
        raise ValueError(f"logits must be [batch, vocabulary], got shape {logit_BV.shape}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def model_step(model: model_lib.Transformer, variables: dict, cache_length: int) -> Callable:
    """Returns the `step` of `generate` for a model on one device; its first cache is {}.

    Raises:
      UserError: a router looks at later tokens, so that one token at a time is another model.
    """
    if model.leak:
        raise UserError(
            f"the routing looks at later tokens ({model.leak}): token by token is not the model that was trained"
        )

    def step(cache: dict, token_BL: jax.Array) -> tuple[jax.Array, dict]:
        inputs = model_lib.Inputs(token_BL, jnp.ones(token_BL.shape, bool))
        out, cache = model.apply(
            variables | cache, inputs, cache_length=cache_length, mutable=["cache"]
        )
        return model_lib.logits(model, variables["params"], out.hidden_BLD[:, -1:])[:, 0], cache

    return step


def generate_run(
    workdir: str | Path,
    prompt: str,
    *,
    step: str | int = "latest",
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """Continues a text with a run's checkpoint, up to the end of the document.

    The prompt follows an end-of-document token, as every document did in training; an empty prompt starts one.

    Args:
      workdir: the run directory.
      step: a checkpoint's step, or latest.
      max_tokens: new tokens at most.
      temperature, top_p, seed: see `sample`.

    Returns:
      The new text without the prompt.
    """
    loaded = evaluate.load_run(workdir, step)
    tokenizer, state = loaded.dataset.tokenizer, loaded.state
    model = model_lib.from_dataset(loaded.config, loaded.dataset)
    tokens = [tokenizer.end_id, *tokenizer.encode(prompt)]

    @jax.jit
    def run(variables: dict, prompt_BL: jax.Array, key: jax.Array) -> jax.Array:
        one_step = model_step(model, variables, len(tokens) + max_tokens)
        return generate(
            one_step,
            {},
            prompt_BL,
            key,
            num_tokens=max_tokens,
            end_id=tokenizer.end_id,
            temperature=temperature,
            top_p=top_p,
        )

    variables = {"params": state.params, "router_state": state.router_state}
    new = run(variables, jnp.asarray([tokens], jnp.int32), jax.random.key(seed))[0].tolist()
    if -1 in new:
        raise ValueError(f"step {loaded.step} of {workdir} gives logits that are not finite")
    if tokenizer.end_id in new:
        new = new[: new.index(tokenizer.end_id)]
    return tokenizer.decode(new)
