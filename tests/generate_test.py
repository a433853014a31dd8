"""Sampling: what may be drawn, how often, and what cannot be drawn from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelab import generate

sample = jax.jit(generate.sample, static_argnames=("temperature", "top_p"))


def draws(logit_V, seed, *, temperature=1.0, top_p=1.0):
    """20 000 draws from one distribution: the rows of one batch."""
    logit_BV = jnp.broadcast_to(logit_V, (20_000, logit_V.size))
    return sample(logit_BV, jax.random.key(seed), temperature=temperature, top_p=top_p)


def frequencies(token_B, size):
    assert token_B.dtype == jnp.int32 and token_B.min() >= 0
    return np.bincount(token_B, minlength=size) / token_B.size


def test_greedy_takes_the_lowest_of_the_largest():
    logit_BV = jnp.array([[0.0, 3.0, 3.0, -1.0], [-jnp.inf, -5.0, -jnp.inf, -5.0]])
    token_B = generate.sample(logit_BV, jax.random.key(0), temperature=0.0)
    assert token_B.tolist() == [1, 1] and token_B.dtype == jnp.int32


# Standard error of a frequency p from 20 000 draws: sqrt(p (1 - p) / 20 000) <= 0.0036; 4.5 of them is 0.016.
@pytest.mark.parametrize(
    "temperature, top_p, wanted",
    [
        (1.0, 1.0, [0.1, 0.2, 0.3, 0.4]),
        # p^(1/T) with T = 1/2 squares: 1, 4, 9, 16 of 30.
        (0.5, 1.0, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        # Mass 0.4 + 0.3 is below 0.75, so 0.2 is in as well: 2, 3, 4 of 9.
        (1.0, 0.75, [0, 2 / 9, 3 / 9, 4 / 9]),
        (1.0, 0.65, [0, 0, 3 / 7, 4 / 7]),
        (1.0, 0.01, [0, 0, 0, 1]),
        # The nucleus is that of the tempered distribution: 16/30 is above 0.5, so one is enough.
        (0.5, 0.5, [0, 0, 0, 1]),
        # A temperature that divides by float32's zero is greedy, not NaN.
        (1e-60, 1.0, [0, 0, 0, 1]),
    ],
)
def test_frequencies(temperature, top_p, wanted):
    # A constant far from 0 changes nothing.
    logit_V = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])) + 50
    token_B = draws(logit_V, 0, temperature=temperature, top_p=top_p)
    found = frequencies(token_B, 4)
    np.testing.assert_allclose(found, wanted, atol=0.016)
    assert (found[np.array(wanted) == 0] == 0).all()


def test_a_temperature_below_float32_keeps_ties():
    token_B = draws(jnp.array([2.0, 1.0, 2.0]), 0, temperature=1e-60, top_p=0.9)
    np.testing.assert_allclose(frequencies(token_B, 3), [0.5, 0, 0.5], atol=0.016)


def test_forbidden_tokens_are_never_drawn():
    token_B = draws(jnp.array([0.0, -jnp.inf, 0.0]), 0, top_p=0.99)
    np.testing.assert_allclose(frequencies(token_B, 3), [0.5, 0, 0.5], atol=0.016)


@pytest.mark.parametrize(
    "top_p, wanted",
    [
        # Powers of two: sums are exact, so "at least" is tested exactly.
        (0.5, [2]),
        (0.5000001, [2, 1]),
        (0.75, [2, 1]),
        (0.76, [2, 1, 0]),  # of the two eighths, the lower id
        (0.875, [2, 1, 0]),
        (0.876, [2, 1, 0, 3]),
        (1.0, [2, 1, 0, 3]),
        (1e-30, [2]),
    ],
)
def test_nucleus_is_the_smallest_set_that_reaches_the_mass(top_p, wanted):
    inside_BV = generate.nucleus(jnp.array([[0.125, 0.25, 0.5, 0.125]]), top_p)
    assert set(np.flatnonzero(inside_BV[0])) == set(wanted)


def test_nucleus_is_minimal_for_random_distributions():
    probability_BV = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (50, 40)))
    inside_BV = np.asarray(generate.nucleus(probability_BV, 0.9))
    for p, inside in zip(np.asarray(probability_BV, np.float64), inside_BV, strict=True):
        assert p[inside].min() >= p[~inside].max()
        # 1e-6: forty float32 terms of a sum near 1.
        assert p[inside].sum() >= 0.9 - 1e-6 > p[inside].sum() - p[inside].min() - 2e-6


def test_a_row_does_not_see_its_batch():
    logit_BV = jax.random.normal(jax.random.key(1), (5, 100))
    draw = functools.partial(sample, key=jax.random.key(2), top_p=0.9)
    together = draw(logit_BV)
    np.testing.assert_array_equal(draw(logit_BV[:3]), together[:3])
    assert len(set(np.asarray(draw(jnp.broadcast_to(logit_BV[:1], (50, 100)))))) > 5


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9)])
def test_no_distribution_no_token(temperature, top_p):
    rows = [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3, [-np.inf, 0, -np.inf]]
    token_B = generate.sample(
        jnp.array(rows, jnp.bfloat16), jax.random.key(0), temperature=temperature, top_p=top_p
    )
    assert token_B.tolist() == [-1, -1, -1, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(temperature=-1.0), "temperature must be finite and at least 0, got -1.0"),
        (dict(temperature=float("nan")), "temperature must be finite and at least 0, got nan"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate.sample(jnp.zeros((1, 3)), jax.random.key(0), **arguments)
    with pytest.raises(ValueError, match=r"must be \[batch, vocabulary\], got shape \(3,\)"):
        generate.sample(jnp.zeros(3), jax.random.key(0))


def count_up(cache, token_BL):
    """A model whose next token is the sum of all tokens so far, modulo 7; the cache is that sum."""
    cache = cache + token_BL.sum(axis=1)
    return jax.nn.one_hot(cache % 7, 7) * 20, cache


def test_generate_feeds_back_what_it_drew():
    prompt_BL = jnp.array([[1, 2], [3, 3]], jnp.int32)
    # 1+2=3; 3+3=6; 6+6=12: 5; 12+5=17: 3 | 3+3=6; 12: 5; 17: 3; 20: 6.
    run = functools.partial(generate.generate, count_up, jnp.zeros(2, jnp.int32), prompt_BL)
    key = jax.random.key(0)
    assert run(key, num_tokens=4, end_id=-1).tolist() == [[3, 6, 5, 3], [6, 5, 3, 6]]
    assert run(key, num_tokens=1, end_id=-1).tolist() == [[3], [6]]
    # After the end there is nothing but the end, for that sequence alone.
    assert run(key, num_tokens=4, end_id=6).tolist() == [[3, 6, 6, 6], [6, 6, 6, 6]]
    assert run(key, num_tokens=4, end_id=5).tolist() == [[3, 6, 5, 5], [6, 5, 5, 5]]


def test_generate_draws_anew_for_each_token_and_repeats_with_the_key():
    flat = lambda cache, token_BL: (jnp.zeros((2, 1000)), cache)  # noqa: E731
    run = functools.partial(generate.generate, flat, (), jnp.zeros((2, 1), jnp.int32))
    options = dict(num_tokens=30, end_id=-1, temperature=1.0)
    token_BN = np.asarray(run(jax.random.key(0), **options))
    assert len(set(token_BN.ravel())) > 50
    np.testing.assert_array_equal(run(jax.random.key(0), **options), token_BN)
    assert (np.asarray(run(jax.random.key(1), **options)) != token_BN).any()


def test_generate_refuses_nothing_to_do():
    with pytest.raises(ValueError, match=r"got \(2, 0\) and 3"):
        generate.generate(
            count_up, 0, jnp.zeros((2, 0), jnp.int32), jax.random.key(0), num_tokens=3, end_id=-1
        )
