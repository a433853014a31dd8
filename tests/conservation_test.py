"""Nothing is lost and nothing is doubled between router, capacity, experts and combine; NaN stays visible."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import (
    apply,
    apply_with_capacity,
    dense,
    is_valid,
    make_inputs,
    make_params,
    make_router,
    make_tokens,
    variants,
)

from moelab import balance, capacity, moe, parallel, routers, routing
from moelab.routers import base, sinkhorn

# Few sizes, so that the examples share compiled operations.
TOKENS = (0, 2, 7, 12)
EXPERTS = (1, 2, 5, 8)


def examples(count):
    """Settings of a property: the same examples in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@functools.cache
def possible(kind):
    """(E, fields) that a config may have: every k for some E, and the cases of the transcription."""
    sizes = [(e, {"k": k}) for e in EXPERTS for k in range(1, e + 1) if is_valid(kind, e, k=k)]
    return sizes + variants(kind)


@st.composite
def problems(draw, kind):
    """A router, its parameters, tokens and inputs: ties, padding, no tokens at all."""
    num_experts, fields = draw(st.sampled_from(possible(kind)))
    router = make_router(kind, num_experts, **fields)
    num_tokens, seed = draw(st.sampled_from(TOKENS)), draw(st.integers(0, 9))
    mask = np.random.default_rng(seed).random(num_tokens) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    columns = router.num_columns if router.uses_previous_logits else None
    inputs = make_inputs(
        num_tokens, length=4, mask=mask, train=draw(st.booleans()), seed=seed, num_columns=columns
    )
    x_TD = make_tokens(num_tokens, seed=seed)
    if draw(st.booleans()):
        x_TD = jnp.zeros_like(x_TD)  # constant logits
    return router, make_params(router, seed=seed), x_TD, inputs


@pytest.mark.parametrize("kind", routers.KINDS)
def test_conservation_of_assignments(kind):
    @examples(6)
    @given(problems(kind))
    def check(problem):
        router, params, x_TD, inputs = problem
        check_routing(router, apply(router, params, x_TD, inputs), inputs)

    check()


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", routers.KINDS)
def test_conservation_with_no_token_and_with_one(kind, num_tokens, train):
    router = make_router(kind)
    columns = router.num_columns if router.uses_previous_logits else None
    inputs = make_inputs(num_tokens, train=train, num_columns=columns)
    x_TD = make_tokens(num_tokens)
    bias = jnp.ones((router.num_columns,)) if router.takes_bias else None
    routed = apply_with_capacity(router, make_params(router), x_TD, inputs, bias)
    check_routing(router, apply(router, make_params(router), x_TD, inputs, bias), inputs)
    assert routed.expert_N.shape == routed.token_N.shape == routed.weight_N.shape


def check_routing(router, routed, inputs):
    """The invariants of `routing.Routing`, by plain loops."""
    token, expert, weight = (np.asarray(a) for a in routed[:3])
    mask, experts = np.asarray(inputs.mask_T), router.num_experts
    num_tokens, columns = mask.size, router.num_columns
    choice = np.asarray(routed.aux.choice_N)
    assert (token.dtype, expert.dtype, choice.dtype) == (np.int32,) * 3
    assert weight.dtype == np.float32 and np.isfinite(weight).all()
    if router.slots:
        assert token.tolist() == [t for t in range(num_tokens) for _ in range(router.slots)]
    else:
        assert token.size == 0 or 0 <= token.min() <= token.max() < num_tokens
    seen, load = set(), [0] * experts
    for t, e, w, c in zip(token.tolist(), expert.tolist(), weight, choice.tolist(), strict=True):
        assert 0 <= e <= columns and 0 <= c <= columns
        nobody = e == experts
        assert nobody == (c == columns), "an expert where a column was chosen, and only there"
        if nobody or not mask[t]:
            assert nobody and w == 0, "no expert, no weight; padding has no expert"
            continue
        assert c == (e if e < experts else e - 1)
        assert (t, e) not in seen, "a token has an expert once"
        seen.add((t, e))
        if e < experts:
            load[e] += 1
    np.testing.assert_array_equal(routing.load(routed.expert_N, experts), load)
    for name in ("logit_TC", "prob_TC", "rank_TC"):
        array = getattr(routed.aux, name)
        assert array.shape == (num_tokens, columns) and array.dtype == jnp.float32, name
    total = np.asarray(routed.aux.prob_TC).sum(axis=1)
    # 0 where a router whose scores may all be 0 (ReLU) gives a token to nobody.
    nobody_T = np.array([all(s[0] != t for s in seen) for t in range(num_tokens)], bool)
    assert (np.isclose(total, 1, atol=1e-5) | (np.isclose(total, 0) & nobody_T)).all()


def dropped_by_a_loop(expert_TK, num_experts, limit, priority_T):
    """Slot by slot, within a slot by priority, ties in order."""
    kept, used = expert_TK.copy(), [0] * num_experts
    order = np.argsort(-priority_T, kind="stable")
    for slot in range(expert_TK.shape[1]):
        for token in order:
            expert = expert_TK[token, slot]
            if expert >= num_experts:
                continue  # nobody, or an expert without computation
            used[expert] += 1
            if used[expert] > limit:
                kept[token, slot] = num_experts
    return kept


@examples(40)
@given(st.data())
def test_conservation_under_a_capacity(data):
    num_tokens = data.draw(st.sampled_from(TOKENS))
    slots, experts = data.draw(st.sampled_from([(1, 3), (2, 4), (4, 4)]))
    idle, limit = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 4))
    draw = np.random.default_rng(data.draw(st.integers(0, 999)))
    # Columns of a token are distinct; some slots are not used, some tokens are padding.
    columns = experts + idle
    column_TK = np.array([draw.permutation(columns)[:slots] for _ in range(num_tokens)])
    column_TK = column_TK.reshape(num_tokens, slots)
    column_TK = np.where(draw.random(column_TK.shape) < 0.2, columns, column_TK)
    inputs = make_inputs(num_tokens, mask=draw.random(num_tokens) < 0.8)
    found = routing.Scores(*[jnp.zeros((num_tokens, columns))] * 3)
    weight_TK = jnp.asarray(1 + draw.random(column_TK.shape), jnp.float32)
    routed = routing.from_token_choice(jnp.asarray(column_TK), weight_TK, found, inputs, experts)
    priority = None
    if data.draw(st.booleans()):  # with ties
        priority = jnp.asarray(draw.integers(0, 3, num_tokens), jnp.float32)
    got = capacity.drop(routed, experts, slots, limit, priority)
    before_TK = np.asarray(routed.expert_N).reshape(num_tokens, slots)
    order_T = np.zeros(num_tokens) if priority is None else np.asarray(priority)
    wanted_TK = dropped_by_a_loop(before_TK, experts, limit, order_T)
    np.testing.assert_array_equal(np.asarray(got.expert_N).reshape(wanted_TK.shape), wanted_TK)
    stays_N = wanted_TK.reshape(-1) != experts
    wanted = np.where(stays_N, np.asarray(routed.weight_N), 0)
    np.testing.assert_array_equal(got.weight_N, wanted)
    np.testing.assert_array_equal(got.aux.choice_N, routed.aux.choice_N)


@pytest.mark.parametrize(
    "arguments, wanted", [((6, 2, 0.5), 2), ((7, 2, 1.0), 4), ((0, 4, 1.0), 1)]
)
def test_conservation_limit_by_hand(arguments, wanted):
    # ceil(.5 * 6 / 2) = 2, ceil(7 / 2) = 4, and one place where nothing is to be placed.
    assert capacity.limit(*arguments) == wanted


@pytest.mark.parametrize("factor", [-1.0, 0.0, np.nan, np.inf])
def test_conservation_limit_wants_a_factor(factor):
    with pytest.raises(ValueError, match=f"finite number above 0, got {factor}"):
        capacity.limit(6, 2, factor)
    with pytest.raises(ValueError, match=f"finite number above 0, got {factor}"):
        capacity.limit_of_valid(jnp.ones((4,), bool), 2, 2, factor)


@pytest.mark.parametrize("k, experts, factor", [(1, 3, 1.1), (8, 64, 1.25), (3, 7, 0.7)])
def test_conservation_limit_of_valid_tokens(k, experts, factor):
    """The traced limit is the static one of the valid tokens, for every number of them."""
    mask_VT = jnp.tri(201, 200, -1, dtype=bool)
    get = jax.jit(jax.vmap(lambda mask_T: capacity.limit_of_valid(mask_T, k, experts, factor)))
    wanted = [capacity.limit(valid * k, experts, factor) for valid in range(201)]
    np.testing.assert_array_equal(get(mask_VT), wanted)
    boundless = capacity.limit_of_valid(jnp.ones((5,), bool), k, experts, 1e12)
    assert boundless == 5 * k  # room for all, where an int32 has none for 1e12


@pytest.mark.parametrize(
    "kind, factor, fields",
    [
        ("batch_priority", 0.8, dict(k=2)),
        ("expert_choice", 0.0, dict(k=2)),
    ],
)
def test_conservation_of_room_with_padding(kind, factor, fields):
    """Padding makes no room: outputs, load and drops are those of the valid tokens alone."""
    router = make_router(kind, 4, **fields)
    config = moe.MoeConfig(
        router=router,
        mechanisms=(),
        expert_width=4,
        capacity_factor=factor,
        implementation="reference",
    )
    block = moe.MoeBlock(config, parallel.make_mesh(1))
    mask = np.arange(22) % 11 % 3 == 1  # 8 of 22
    x_TD = np.array(make_tokens(22, width=8))
    x_TD[~mask] *= 9  # confident padding would go before the others
    variables = jax.jit(
        lambda: block.init(jax.random.key(1), jnp.zeros((1, 2, 8)), make_inputs(2))
    )()

    def run(x_TD, mask):
        inputs = make_inputs(mask.size, mask=mask)._replace(train=None)
        apply = lambda x, i: block.apply(variables, x[None], i._replace(train=True))  # noqa: E731
        y_BLD, report, _ = jax.jit(apply)(jnp.asarray(x_TD), inputs)
        return np.asarray(y_BLD[0]), report

    y_TD, padded = run(x_TD, mask)
    wanted_TD, alone = run(x_TD[mask], mask[mask])
    np.testing.assert_allclose(y_TD[mask], wanted_TD, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y_TD[~mask], 0)
    np.testing.assert_array_equal(padded.load_E, alone.load_E)
    assert float(padded.dropped) == float(alone.dropped)
    assert (float(alone.dropped) > 0) == (factor > 0), "nothing was dropped: nothing was tested"


@examples(10)
@given(st.sampled_from([(12, 3), (12, 5), (7, 2), (3, 8)]), st.integers(0, 99))
def test_conservation_of_base_with_padding(size, seed):
    """Each expert takes its part of the valid tokens, and the sum of scores is nearly the largest."""
    num_tokens, experts = size
    draw = np.random.default_rng(seed)
    score = draw.normal(size=size).astype(np.float32)
    mask = draw.random(num_tokens) < 0.7
    owner = np.asarray(
        base.balanced_assignment(jnp.asarray(score), jnp.asarray(mask), max_iterations=2000)
    )
    places = -(-int(mask.sum()) // experts)
    counts = np.bincount(owner[mask], minlength=experts)
    assert counts.max() <= places and counts.sum() == mask.sum()
    repeated = np.repeat(score[mask], places, axis=1)  # an expert's places are columns of their own
    rows, cols = scipy.optimize.linear_sum_assignment(repeated, maximize=True)
    best = repeated[rows, cols].sum()
    # An auction ends within T * epsilon of the optimum, epsilon a thousandth of the spread.
    assert score[mask][np.arange(mask.sum()), owner[mask]].sum() >= best - 1e-3 * 12 * np.ptp(score)


def test_conservation_of_base_when_tokens_want_the_same():
    """The default number of rounds ends an auction of scores that are mostly the experts' own; 200 do not."""
    draw = np.random.default_rng(0)
    score = 3 * draw.normal(size=(1, 8)) + 0.3 * draw.normal(size=(128, 8))
    given = jnp.asarray(score, jnp.float32), jnp.ones((128,), bool)
    auction = jax.jit(base.balanced_assignment)
    owner = np.asarray(auction(*given, base.Router.max_iterations))
    # A bound that no test could wait for: the loop stops when everybody has a place.
    np.testing.assert_array_equal(owner, auction(*given, 10**9))
    repeated = np.repeat(score, 16, axis=1)
    rows, cols = scipy.optimize.linear_sum_assignment(repeated, maximize=True)
    best, slack = repeated[rows, cols].sum(), 1e-3 * 128 * np.ptp(score)
    total = lambda owner: score[np.arange(128), owner].sum()  # noqa: E731
    assert total(owner) >= best - slack
    assert total(np.asarray(auction(*given, 200))) < total(owner) - 1
    # Without a difference no price rises: an auction would run for ever.
    equal = np.asarray(auction(jnp.zeros((128, 8)), given[1], 10**9))
    np.testing.assert_array_equal(np.bincount(equal), [16] * 8)


@pytest.mark.parametrize("kind", ["base", "sinkhorn"])
def test_conservation_of_balanced_routers_with_padding_at_the_end(kind):
    router = make_router(kind)
    params, x_TD = make_params(router), make_tokens(16)
    whole = apply(router, params, x_TD[:12], make_inputs(12, train=True))
    padded = make_inputs(16, mask=np.arange(16) < 12, train=True)
    got = apply(router, params, x_TD, padded)
    np.testing.assert_array_equal(got.expert_N[:12], whole.expert_N)
    np.testing.assert_allclose(got.weight_N[:12], whole.weight_N, rtol=1e-6)


def test_conservation_of_sinkhorn_rows_far_apart():
    """A row far below the others, or above, is scaled like them: exp underflows 104 below, and d1 is no row's."""
    logit = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    shift_T1 = np.array([0, -104, -300, 104, 1e4, 0, -1e4, 0], np.float32)[:, None]
    arguments = jnp.ones((8,), bool), 1e-4, 100
    wanted = np.asarray(sinkhorn.normalise(jnp.asarray(logit), *arguments))
    # The sums keep three digits of a logit of 1e4.
    got = sinkhorn.normalise(jnp.asarray(logit + shift_T1), *arguments)
    np.testing.assert_allclose(got, wanted, rtol=1e-2)
    np.testing.assert_allclose(wanted.sum(axis=1), 1 / 8, rtol=1e-5)
    router = make_router("sinkhorn", 4)
    params = {"kernel": jnp.asarray(logit + shift_T1)}
    routed = apply(router, params, jnp.eye(8), make_inputs(8, train=True))
    np.testing.assert_array_equal(routed.expert_N, wanted.argmax(axis=1))


@pytest.mark.parametrize("kind", balance.KINDS)
def test_conservation_of_state_in_a_step_of_padding(kind):
    """A step without a valid token teaches nothing: every state stays, whatever it holds."""
    module = balance.module(kind).Mechanism
    strength, *rest = module.__dataclass_fields__
    scope = {"scope": "global_batch"} if "scope" in rest else {}
    estimators = balance.module(kind).ESTIMATORS if "estimator" in rest else (None,)
    router = make_router("remoe" if kind == "relu_l1" else "top_k", 4)
    params, x_TD = make_params(router, width=8), make_tokens(6, width=8)
    routed = apply(router, params, x_TD, make_inputs(6, mask=np.zeros(6, bool), train=True))
    for estimator in estimators:
        chosen = {"estimator": estimator} if estimator else {}
        mechanism = balance.make(kind, **{strength: 0.25} | scope | chosen)
        draw = np.random.default_rng(0)
        state = jax.tree.map(
            lambda a: jnp.asarray(draw.uniform(0.1, 0.2, a.shape), jnp.float32),  # noqa: B023
            mechanism.init(router),
        )
        total = mechanism.observe(routed, state, router) | mechanism.rows(routed, state, router)
        new = mechanism.update(state, total, router)
        jax.tree.map(np.testing.assert_array_equal, new, state)


@examples(10)
@given(st.sampled_from([(12, 3, 1), (12, 3, 2), (7, 2, 2), (3, 8, 2)]), st.integers(0, 99))
def test_conservation_of_expert_choice_with_padding(size, seed):
    """Each expert takes its best valid tokens, ties to the first, as many as it would without the padding."""
    num_tokens, experts, k = size
    router = make_router("expert_choice", experts, k=k)
    mask = np.random.default_rng(seed).random(num_tokens) < 0.5
    inputs = make_inputs(num_tokens, mask=mask)
    routed = apply(router, make_params(router, seed=seed), make_tokens(num_tokens), inputs)
    chosen, weight = dense(router, routed)
    prob = np.asarray(routed.aux.prob_TC)
    limit = -(-int(mask.sum()) * k // experts)
    for e in range(experts):
        best = sorted(np.flatnonzero(mask), key=lambda t: (-prob[t, e], t))[:limit]
        assert sorted(best) == np.flatnonzero(chosen[:, e]).tolist()
    np.testing.assert_allclose(weight, np.where(chosen, prob, 0), rtol=1e-6)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", routers.KINDS)
def test_conservation_of_nan(kind, bad, train):
    """A row that is not finite has an output that is not finite; other rows keep theirs."""
    for num_experts, fields in variants(kind) if np.isnan(bad) and train else [(8, {})]:
        router = make_router(kind, num_experts, **fields)
        columns = router.num_columns if router.uses_previous_logits else None
        inputs = make_inputs(6, train=train, num_columns=columns)
        params, x_TD = make_params(router), make_tokens(6)
        rotten_TD = x_TD.at[2].set(bad) if np.isnan(bad) else x_TD.at[2, 3].set(bad)
        chosen, weight = dense(router, apply(router, params, x_TD, inputs))
        routed = apply(router, params, rotten_TD, inputs)
        # An expert's output is NaN for such a row; a weight that is NaN makes it so in any case.
        mine = np.asarray(routed.token_N) == 2
        expert, mine_weight = np.asarray(routed.expert_N)[mine], np.asarray(routed.weight_N)[mine]
        computed = expert < num_experts
        shows = np.isnan(mine_weight[expert != num_experts]).any() or computed.any()
        assert computed.any() and shows, f"{fields}: the row's output is finite"
        if np.isnan(bad) and "kernel" in params and getattr(router, "weights", "") != "equal":
            assert np.isnan(mine_weight[computed]).all(), f"{fields}: finite weights of a NaN row"
        if not router.competes:
            rotten_chosen, rotten_weight = dense(router, routed)
            others = np.arange(6) != 2
            np.testing.assert_array_equal(rotten_chosen[others], chosen[others])
            np.testing.assert_allclose(rotten_weight[others], weight[others], rtol=1e-6)


@pytest.mark.parametrize(
    "kind, factor, fields",
    [
        ("top_k", 0.5, dict(k=2, scale=2.0)),
        ("zero_computation", 0.3, dict(k=3, num_constant=2)),
        ("expert_choice", 0.0, dict(k=2)),
    ],
)
def test_conservation_through_a_block(kind, factor, fields):
    """The block's output is the sum that its routing says, computed token by token in float64."""
    router = make_router(kind, 4, **fields)
    config = moe.MoeConfig(
        router=router,
        mechanisms=(),
        expert_width=8,
        capacity_factor=factor,
        implementation="reference",
    )
    block = moe.MoeBlock(config, parallel.make_mesh(1))
    columns = router.num_columns if router.uses_previous_logits else None
    mask = np.arange(12) % 5 != 3
    inputs = make_inputs(12, length=6, mask=mask, train=True, num_columns=columns)
    inputs = inputs._replace(train=None)
    x_BLD = make_tokens(12).reshape(2, 6, 16)

    @jax.jit
    def run(inputs):
        told = inputs._replace(train=True)
        variables = block.init(jax.random.key(1), x_BLD, told)
        return variables["params"], block.apply(variables, x_BLD, told, trace=True)

    params, (y_BLD, report, _) = jax.tree.map(np.asarray, run(inputs))
    routed, x = report.trace, np.asarray(x_BLD, np.float64).reshape(12, 16)
    wanted, load, idle, dropped = np.zeros((12, 16)), np.zeros(5), 0, 0
    for t, e, w, c in zip(*routed[:3], routed.aux.choice_N, strict=True):
        load[min(e, 4)] += 1
        idle += e > 4
        dropped += c < router.num_columns and e == 4
        assert mask[t] or (e == 4 and w == 0)
        wanted[t] += w * output_of(params, router.idle_experts, e, x[t])
    np.testing.assert_allclose(y_BLD.reshape(12, 16), wanted, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(report.load_E, load[:4])
    assert (report.idle, report.dropped) == (idle, dropped)
    assert (dropped > 0) == (factor > 0)


def output_of(params, kinds, expert, x_D):
    """What the expert with an id makes of one token."""
    if expert == 4:
        return np.zeros_like(x_D)
    if expert < 4:
        gate, up = np.split(params["experts"]["gate_up"][expert].astype(np.float64) @ x_D, 2)
        return params["experts"]["down"][expert].astype(np.float64) @ (
            gate / (1 + np.exp(-gate)) * up
        )
    kind = kinds[expert - 5]
    if kind == "constant":
        number = kinds[: expert - 5].count("constant")
        mix = np.exp(x_D @ params["idle"]["kernel"][number])
        mix = mix / mix.sum()
        return mix[0] * x_D + mix[1] * params["idle"]["vector"][number]
    return x_D if kind == "copy" else np.zeros_like(x_D)
