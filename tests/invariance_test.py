"""What a step does depends neither on how its batch is cut, nor on padding, nor on recomputation."""

import contextlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import (
    apply,
    dense,
    make_inputs,
    make_params,
    make_router,
    make_tokens,
    transcription,
    variants,
)
from small_step import BALANCE, assert_same_steps, small_config, two_steps

from moelab import balance, balancing, routers

LENGTH, NUM_TOKENS = 4, 32
ALONE = [
    pytest.param(kind, *variant, id=f"{kind}-{i}")
    for kind in routers.KINDS
    for i, variant in enumerate(variants(kind))
    if not make_router(kind, variant[0], **variant[1]).competes
]


def whole_batch(router, seed=0, mask=None):
    """Tokens in training; the padding differs between the sequences."""
    columns = router.num_columns if router.uses_previous_logits else None
    if mask is None:
        mask = np.random.default_rng(seed).random(NUM_TOKENS) < np.linspace(0.3, 1, NUM_TOKENS)
    inputs = make_inputs(
        NUM_TOKENS, length=LENGTH, mask=mask, train=True, seed=seed, num_columns=columns
    )
    return make_tokens(NUM_TOKENS, seed=seed), inputs


def rows(inputs, index):
    """The inputs of some tokens of the batch; their key and their places in the batch stay."""
    return type(inputs)(
        *(
            a if a is None or name in ("key", "train") else a[index]
            for name, a in inputs._asdict().items()
        )
    )


def cut(x_TD, inputs, count):
    """Micro-batches as the step makes them: their sequences are numbered from 0."""
    size, found = NUM_TOKENS // count, []
    for i in range(count):
        part = rows(inputs, slice(i * size, (i + 1) * size))
        part = part._replace(sequence_T=part.sequence_T - i * size // LENGTH)
        found.append((x_TD[i * size : (i + 1) * size], part))
    return found


@pytest.mark.parametrize("kind, num_experts, fields", ALONE)
def test_invariance_of_a_router_to_the_cut_and_to_padding(kind, num_experts, fields):
    router = make_router(kind, num_experts, **fields)
    params, (x_TD, inputs) = make_params(router), whole_batch(router)
    chosen, weight = dense(router, apply(router, params, x_TD, inputs))
    # Padding in three places, with places in the batch that no token has.
    place = np.insert(np.arange(NUM_TOKENS), [0, 11, NUM_TOKENS], -1)
    padded = rows(inputs, np.maximum(place, 0))
    padded = padded._replace(
        mask_T=padded.mask_T & (place >= 0),
        position_T=jnp.where(place >= 0, padded.position_T, 999),
    )
    longer = apply(router, params, x_TD[np.maximum(place, 0)], padded)
    halves = [dense(router, apply(router, params, *half)) for half in cut(x_TD, inputs, 2)]
    joined = [np.concatenate(arrays) for arrays in zip(*halves, strict=True)]
    for name, (got, got_weight) in {
        "halves": joined,
        "padding": [a[place >= 0] for a in dense(router, longer)],
    }.items():
        np.testing.assert_array_equal(got, chosen, err_msg=name)
        # Another shape may sum in another order.
        np.testing.assert_allclose(got_weight, weight, rtol=1e-5, atol=1e-7, err_msg=name)


def mechanisms():
    """Every mechanism with its cases, one of each sort, those of a scope in all scopes.

    As (kind, fields, router's fields).
    """
    found, sorts = [], set()
    for kind in balance.KINDS:
        known = balance.module(kind).Mechanism.__dataclass_fields__
        strength = next(iter(known))
        cases = [{"fields": {}}]
        try:
            cases += transcription("balance", kind).CASES
        except AssertionError:
            pass  # conformance_test says so
        scoped = issubclass(balance.module(kind).Mechanism, balancing.ScopedLoss)
        for case in cases:
            wanted = {"kind": "remoe"} if kind == "relu_l1" else {"kind": "top_k"}
            router = wanted | case.get("router", {})
            scopes = balancing.SCOPES if scoped and "scope" not in case["fields"] else [None]
            for scope in scopes:
                fields = {strength: 0.5} | case["fields"] | ({"scope": scope} if scope else {})
                choices = (v for v in fields.values() if isinstance(v, str | bool))
                sort = (kind, *sorted(fields), *choices, router["kind"])
                if sort not in sorts:
                    sorts.add(sort)
                    found.append((kind, fields, router))
    return [
        pytest.param(*f, id="-".join([f[0], *(str(v) for v in f[1].values()), f[2]["kind"]]))
        for f in found
    ]


def micro_batched(mechanism, router, params, state, parts):
    """(sum of the share-weighted losses, its gradient), summed statistics and concatenated rows."""
    tokens = [jnp.sum(inputs.mask_T).astype(jnp.float32) for _, inputs in parts]
    bias = mechanism.selection_bias(state)

    def total(params):
        value, seen = jnp.zeros(()), []
        for (x_TD, inputs), own in zip(parts, tokens, strict=True):
            routed = apply(router, params, x_TD, inputs, bias)
            value = value + mechanism.loss(routed, state, router) * (own / sum(tokens))
            summed = mechanism.observe(routed, state, router)
            seen.append((summed, mechanism.rows(routed, state, router)))
        return value, seen

    (value, seen), gradient = jax.value_and_grad(total, has_aux=True)(params)
    summed = {name: sum(s[name] for s, _ in seen) for name in seen[0][0]}
    joined = {name: jnp.concatenate([r[name] for _, r in seen]) for name in seen[0][1]}
    return value, gradient, jax.lax.stop_gradient(summed | joined)


def in_one_step(mechanism, router, params, state, parts):
    """Loss, gradient and new state of a step, counting first where the mechanism wants it."""
    if mechanism.counts_first:
        counted = micro_batched(mechanism, router, params, state, parts)[2]
        state = mechanism.update(state, counted, router)
    value, gradient, total = micro_batched(mechanism, router, params, state, parts)
    return value, gradient, mechanism.update(state, total, router) if state else {}


def assert_near(one, other):
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)  # noqa: E731
    jax.tree.map(near, one, other)


@pytest.mark.parametrize("kind, fields, router", mechanisms())
def test_invariance_of_a_mechanism_to_the_cut(kind, fields, router):
    mechanism, router = balance.make(kind, **fields), make_router(**router)
    params, (x_TD, inputs) = make_params(router), whole_batch(router)
    state = mechanism.init(router)
    if "bias_C" in state:
        bias_C = 0.1 * jax.random.normal(jax.random.key(3), state["bias_C"].shape)
        state = state | {"bias_C": bias_C}

    def of(count):
        return in_one_step(mechanism, router, params, state, cut(x_TD, inputs, count))

    whole = of(1)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(whole))
    if mechanism.has_loss and router.slots:
        assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(whole[1])) or kind == "load_loss"
    if not mechanism.invariant:
        # Declared for a reason; what holds given the groups is in group_invariance_test.
        same = kind == "load_loss" and not np.any(whole[0])  # there is no noise
        with contextlib.nullcontext() if same else pytest.raises(AssertionError):
            assert_near(whole, of(2))
        return
    for count in (2, 4) if len(fields) < 3 else (4,):
        assert_near(whole, of(count))
    if fields.get("scope") == "global_batch" and mechanism.counts == "first":
        micro = balance.make(kind, **fields | {"scope": "micro_batch"})
        value, gradient, _ = in_one_step(micro, router, params, {}, cut(x_TD, inputs, 1))
        assert_near(whole[:2], (value, gradient))


@pytest.fixture(scope="module")
def plain_steps():
    return two_steps(small_config(balance=BALANCE))


@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_invariance_of_a_step_to_accumulation(plain_steps, accumulation_steps):
    accumulated = two_steps(small_config(balance=BALANCE), accumulation_steps)
    assert_same_steps(plain_steps, accumulated)


def test_invariance_of_a_step_to_remat(plain_steps):
    assert_same_steps(plain_steps, two_steps(small_config(balance=BALANCE, remat=True)))


def test_invariance_of_noise_to_accumulation():
    """The chance of selection comes from the noise, and so do the choices: both balanced over the global batch."""
    scope = dict(coefficient=0.1, scope="global_batch")
    config = small_config("noisy_top_k", balance=dict(load_loss=scope, importance_loss=scope))
    assert_same_steps(two_steps(config), two_steps(config, 2))


def test_invariance_of_random_routing_to_accumulation():
    config = small_config("uniform")
    one, other = two_steps(config), two_steps(config, 4)
    np.testing.assert_array_equal(one[1][1].load_ME, other[1][1].load_ME)
    assert not np.array_equal(one[0][1].load_ME, one[1][1].load_ME), "a step's noise is its own"


def test_invariance_to_the_number_of_devices():
    """A process of its own has 8 virtual devices."""
    code = os.path.join(os.path.dirname(__file__), "devices_check.py")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, code],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal on 1, 2 and 8 devices" in done.stdout
