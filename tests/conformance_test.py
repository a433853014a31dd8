"""Every router and mechanism against a numpy transcription of its paper, written without sight of the implementation.

A file in `routers/` or `balance/` without its transcription in `conformance/` fails here.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import (
    VOCAB,
    apply,
    dense,
    make_inputs,
    make_params,
    make_router,
    make_tokens,
    plain_aux,
    transcription,
)

from moelab import balance, routers, routing

NUM_TOKENS = 64  # every id of the small vocabulary once


def cases(folder, kinds):
    """(kind, index of the case) of every transcription; one without cases is a test that fails."""
    found = []
    for kind in kinds:
        try:
            count = len(transcription(folder, kind).CASES)
        except AssertionError:
            count = 1
        found += [pytest.param(kind, i, id=f"{kind}-{i}") for i in range(max(count, 1))]
    return found


def given_of(router, inputs, bias, counts):
    """What a transcription may look at, as numpy."""
    as_float = lambda a: np.asarray(a, np.float64)  # noqa: E731
    previous = inputs.previous_logit_TC
    return SimpleNamespace(
        token_id=np.asarray(inputs.token_id_T),
        position=np.asarray(inputs.position_T),
        sequence=np.asarray(inputs.sequence_T),
        domain=np.asarray(inputs.domain_T),
        mask=np.asarray(inputs.mask_T),
        bias=None if bias is None else as_float(bias),
        normal=lambda width: as_float(routing.normal_noise(inputs, width)),
        uniform=lambda width: as_float(routing.uniform_noise(inputs, width)),
        previous_logit=None if previous is None else as_float(previous),
        token_counts=np.asarray(counts),
    )


def as_numpy(params):
    """Parameters in float64."""
    return {name: np.asarray(a, np.float64) for name, a in params.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind, index", cases("routers", routers.KINDS))
def test_router_conformance(kind, index, masked):
    paper = transcription("routers", kind)
    assert paper.CASES and paper.example, "a transcription has cases and a hand-worked example"
    case = paper.CASES[index]
    router = make_router(kind, case["num_experts"], **case["fields"])
    if masked and kind == "base" and case["train"]:
        pytest.skip("the transcription has no padding; tests/conservation_test.py has")
    mask = np.random.default_rng(index).random(NUM_TOKENS) < 0.7 if masked else None
    columns = router.num_columns if router.uses_previous_logits else None
    inputs = make_inputs(
        NUM_TOKENS, mask=mask, train=case["train"], seed=index, num_columns=columns
    )
    bias = None
    if case["bias"]:
        bias = 0.2 * jax.random.normal(jax.random.key(index + 9), (router.num_columns,))
    params, x_TD = make_params(router, seed=index), make_tokens(NUM_TOKENS, seed=index)
    routed = apply(router, params, x_TD, inputs, bias)
    chosen, weight = dense(router, routed)
    counts = getattr(router, "token_counts", (1,) * VOCAB)
    given = given_of(router, inputs, bias, counts)
    arguments = (np.asarray(x_TD, np.float64), as_numpy(params), case, given)
    if hasattr(paper, "check"):
        paper.check(*arguments, chosen, weight)
        return
    wanted, wanted_weight = paper.route(*arguments)
    same_T = (chosen == wanted).all(axis=1)
    # Tie-aware: where the sets differ, what was taken and what was left rank equally but for rounding.
    rank_TC = np.asarray(routed.aux.rank_TC) + (0 if bias is None else np.asarray(bias))
    for token in np.flatnonzero(~same_T):
        ranks = rank_TC[token, chosen[token] != wanted[token]]
        assert np.ptp(ranks) < 1e-5, f"token {token}: {chosen[token]} against {wanted[token]}"
    assert same_T.mean() > 0.95
    np.testing.assert_allclose(weight[same_T], wanted_weight[same_T], rtol=2e-4, atol=2e-6)
    if routed.aux.margin_TC is not None:
        chance = jax.scipy.stats.norm.cdf(routed.aux.margin_TC)
        valid = same_T & given.mask
        np.testing.assert_allclose(chance[valid], paper.chance(*arguments)[valid], atol=2e-5)


@pytest.mark.parametrize("kind", routers.KINDS)
def test_router_conformance_with_the_hand_worked_example(kind):
    example = transcription("routers", kind).example()
    case, given = example["case"], example["given"]
    router = make_router(kind, case["num_experts"], **case["fields"])
    num_tokens = len(example["x"])
    inputs = make_inputs(num_tokens, mask=given.get("mask"), train=case["train"])
    replace = {
        "token_id": "token_id_T",
        "domain": "domain_T",
        "previous_logit": "previous_logit_TC",
    }
    for name, field in replace.items():
        if name in given:
            dtype = jnp.float32 if name == "previous_logit" else jnp.int32
            inputs = inputs._replace(**{field: jnp.asarray(given[name], dtype)})
    if "token_counts" in given:
        router = router.clone(token_counts=tuple(given["token_counts"]))
    bias = given.get("bias")
    bias = None if bias is None else jnp.asarray(bias, jnp.float32)
    params = {name: jnp.asarray(a, jnp.float32) for name, a in example["params"].items()}
    x_TD = jnp.asarray(example["x"], jnp.float32)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal", "uniform"):
            if name in given:
                noise = lambda _, width, n=name: jnp.asarray(given[n](width), jnp.float32)  # noqa: E731
                patch.setattr(routing, f"{name}_noise", noise)
        chosen, weight = dense(router, apply(router, params, x_TD, inputs, bias))
    np.testing.assert_array_equal(chosen, example["chosen"])
    np.testing.assert_allclose(weight, example["weight"], rtol=1e-4, atol=1e-6)


def routed_batch(router, num_tokens, seed, state, mechanism):
    """A routing of random tokens in training, under the mechanism's bias; every seventh token is padding."""
    mask = np.arange(num_tokens) % 7 != 3
    columns = router.num_columns if router.uses_previous_logits else None
    inputs = make_inputs(num_tokens, mask=mask, train=True, seed=seed, num_columns=columns)
    x_TD = make_tokens(num_tokens, seed=seed + 50)
    params = make_params(router, seed=1)
    return apply(router, params, x_TD, inputs, mechanism.selection_bias(state))


@pytest.mark.parametrize("kind, index", cases("balance", balance.KINDS))
def test_mechanism_conformance(kind, index):
    paper = transcription("balance", kind)
    case = paper.CASES[index]
    fields = {"kind": "top_k"} | case.get("router", {})
    router = make_router(**fields)
    strength = next(iter(balance.module(kind).Mechanism.__dataclass_fields__))
    mechanism = balance.make(kind, **({strength: 0.5} | case["fields"]))
    if kind == "quantile_bias" and "rate" not in case["fields"]:
        mechanism = balance.make(kind, **({"rate": 1.0} | case["fields"]))
    written = {strength: mechanism.strength} | case["fields"]
    state = mechanism.init(router)
    # Micro-batches of different sizes; 59 and 30 tokens leave no quantile on a boundary of a bin.
    batches = [routed_batch(router, n, seed, state, mechanism) for seed, n in enumerate((59, 30))]
    plain_state = {name: np.asarray(a, np.float64) for name, a in state.items()}
    for routed in batches:
        if mechanism.has_loss:
            wanted = paper.loss(plain_aux(router, routed), written, plain_state)
            got = float(mechanism.loss(routed, state, router))
            assert got == pytest.approx(wanted, rel=2e-4, abs=1e-6)
    assert hasattr(paper, "loss") == bool(mechanism.has_loss), "the loss is not transcribed"
    if not hasattr(paper, "update"):
        assert not state, "it has a state, and the transcription does not move it"
        return
    for _ in range(2):  # the second time from a state that is not the first
        total = summed([mechanism.observe(r, state, router) for r in batches])
        rows = [mechanism.rows(r, state, router) for r in batches]
        total |= {n: jnp.concatenate([row[n] for row in rows]) for n in rows[0]}
        wanted = paper.update(plain_state, [plain_aux(router, r) for r in batches], written)
        state = mechanism.update(state, total, router)
        width = (
            2.5 * mechanism.span / mechanism.bins
            if getattr(mechanism, "estimator", "") == "histogram"
            else 2e-5
        )
        for name, value in wanted.items():
            np.testing.assert_allclose(state[name], value, rtol=1e-5, atol=width)
        plain_state = {name: np.asarray(a, np.float64) for name, a in state.items()}
        batches = [routed_batch(router, n, i, state, mechanism) for i, n in enumerate((59, 30))]


def summed(statistics):
    """Adds dicts of arrays up."""
    return {name: sum(s[name] for s in statistics) for name in statistics[0]}


@pytest.mark.parametrize("kind", balance.KINDS)
def test_mechanism_conformance_with_the_hand_worked_example(kind):
    example = transcription("balance", kind).example()
    aux = example["aux"]
    aux = SimpleNamespace(**aux) if isinstance(aux, dict) else aux
    router = example_router(kind, aux)
    mechanism = balance.make(kind, **example["fields"])
    state = {n: jnp.asarray(a, jnp.float32) for n, a in example.get("state", {}).items()}
    routed = as_routing(aux)
    if "loss" in example:
        got = float(mechanism.loss(routed, state, router))
        assert got == pytest.approx(example["loss"], rel=1e-4, abs=1e-6)
    if "updated" in example:
        total = mechanism.observe(routed, state, router) | mechanism.rows(routed, state, router)
        for name, value in mechanism.update(state, total, router).items():
            np.testing.assert_allclose(value, example["updated"][name], rtol=1e-4, atol=2e-3)


def example_router(kind, aux):
    """A router of the example's size: what mechanisms ask of it are its counts."""
    columns, k = aux.prob.shape[1], max(1, round(float(aux.k)))
    if columns > aux.num_experts:
        idle = {"num_zero": columns - aux.num_experts, "num_copy": 0, "num_constant": 0}
        return make_router("zero_computation", aux.num_experts, k=k, **idle)
    return make_router("remoe" if kind == "relu_l1" else "top_k", aux.num_experts, k=k)


def as_routing(aux):
    """The Routing of a transcription's aux; its dense weights decide which slot has which weight."""
    num_tokens, slots = aux.choice.shape
    columns = aux.prob.shape[1]
    choice = jnp.asarray(aux.choice, jnp.int32)
    weight = np.concatenate([np.asarray(aux.weight, np.float32), np.zeros((num_tokens, 1))], axis=1)
    weight_TK = np.take_along_axis(weight, np.asarray(aux.choice), axis=1)
    inputs = make_inputs(num_tokens, mask=aux.mask)
    inputs = inputs._replace(sequence_T=jnp.asarray(aux.sequence, jnp.int32))
    margin = None
    if aux.chance is not None:
        margin = jax.scipy.stats.norm.ppf(jnp.asarray(aux.chance, jnp.float32))
    found = routing.Scores(
        *(jnp.asarray(a, jnp.float32) for a in (aux.logit, aux.prob, aux.rank)), margin
    )
    weight_TK = jnp.asarray(weight_TK, jnp.float32)
    assert slots == choice.shape[1] and columns >= aux.num_experts
    return routing.from_token_choice(choice, weight_TK, found, inputs, aux.num_experts)
