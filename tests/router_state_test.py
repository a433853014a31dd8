"""The state of a balancing mechanism: float32, checkpointed bit for bit, moved once a step, still in evaluation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import apply, make_inputs, make_params, make_router, make_tokens
from small_step import (
    compiled_step,
    initial_state,
    make_batch,
    small_config,
    states_of,
    train_step,
    with_every_mechanism,
)
from tiny import VOCAB

from moelab import balance, balancing, checkpoint, model

ONE = np.float32(1)


def strong(kind, **fields):
    """The mechanism at work, over the global batch where it has a choice."""
    known = balance.module(kind).Mechanism.__dataclass_fields__
    scope = {"scope": "global_batch"} if "scope" in known else {}
    return balance.make(kind, **{next(iter(known)): 0.25} | scope | fields)


def moved(mechanism, router):
    """A mechanism's state before and after the update of one step."""
    params, inputs = make_params(router), make_inputs(24, train=True)
    state = mechanism.init(router)
    routed = apply(router, params, 1 + make_tokens(24), inputs, mechanism.selection_bias(state))
    total = mechanism.observe(routed, state, router) | mechanism.rows(routed, state, router)
    return state, mechanism.update(state, total, router)


@pytest.mark.parametrize("kind", balance.KINDS)
def test_state_is_float32_and_keeps_its_shape(kind):
    mechanism, router = strong(kind), make_router("remoe" if kind == "relu_l1" else "top_k")
    state, new = moved(mechanism, router)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(state))
    if state:
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (state, new)), strict=True))
    assert (mechanism.selection_bias(state) is None) == ("bias_C" not in state)
    if mechanism.has_loss:
        assert jnp.shape(mechanism.weight(state)) == ()


def test_states_come_back_from_a_checkpoint_bit_for_bit(tmp_path):
    """The numbers are made odd: a subnormal, a negative zero, one that float16 or text would round."""
    odd = np.array([1e-41, -0.0, 0.1, 1 / 3, -16777217.0, 3e38], np.float32)
    states = {}
    for kind in balance.KINDS:
        router = make_router("remoe" if kind == "relu_l1" else "top_k")
        state = moved(strong(kind), router)[1]
        if state:
            fill = lambda a: jnp.asarray(np.resize(odd, a.shape))  # noqa: E731
            states[kind] = {"moved": state, "odd": jax.tree.map(fill, state)}
    assert set(states) >= {"loss_free_bias", "quantile_bias", "adaptive_loss", "relu_l1"}
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        digest = checkpoints.save(3, states)
        step, back = checkpoints.restore_latest(jax.eval_shape(lambda: states))
    bits = lambda tree: jax.tree.map(lambda a: np.asarray(a).view(np.uint32), tree)  # noqa: E731
    chex.assert_trees_all_equal(bits(back), bits(states))
    chex.assert_trees_all_equal_dtypes(back, states)
    assert step == 3 and checkpoint.state_digest(back) == digest


@pytest.fixture(scope="module")
def everything():
    """A model with every mechanism of the folder on, and two steps of it; noise, for those that go by it."""
    config = small_config("noisy_top_k")
    transformer = with_every_mechanism(model.from_config(config, VOCAB))
    function = chex.assert_max_traces(train_step(config, transformer), n=1)
    run, state = jax.jit(function), initial_state(transformer)
    first, _ = run(state, make_batch(seed=1), ONE)
    return config, transformer, run, first, run(first, make_batch(seed=2), ONE)


def test_state_moves_in_every_step_and_is_compiled_once(everything):
    _, transformer, _, first, (second, report) = everything
    before = states_of(initial_state(transformer))
    one, two = states_of(first), states_of(second)
    assert set(one) == {kind for kind in balance.KINDS if strong(kind).init(make_router("top_k"))}
    assert bool(report.finite) and int(second.step) == 2
    for kind in one:
        for old, new in ((before, one), (one, two)):
            changed = jax.tree.map(lambda a, b: (a != b).any(), old[kind], new[kind])
            assert any(jax.tree.leaves(changed)), f"{kind} did not move"
    # One rate up or down, or none, in a step: not one for each micro-batch, nor twice for counting first.
    step_C = np.abs(two["loss_free_bias"]["bias_C"] - one["loss_free_bias"]["bias_C"])
    assert set(step_C.round(5).ravel()) <= {0, np.float32(0.01)}


def test_state_moves_once_whatever_the_accumulation(everything):
    """From the same state, the update of the whole batch's statistics; not all gradients are the same."""
    config, transformer, _, first, (second, _) = everything
    run = compiled_step(config, transformer, accumulation_steps=4)
    other, _ = run(first, make_batch(seed=2), ONE)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(near, states_of(second), states_of(other))


def test_a_skipped_step_leaves_the_state(everything):
    _, _, run, first, _ = everything
    new, report = run(first, make_batch(seed=2), np.float32("nan"))
    assert not bool(report.finite)
    chex.assert_trees_all_equal(new.router_state, first.router_state)
    assert int(new.skipped) == 1 and int(new.step) == int(first.step) + 1


def test_state_is_no_parameter_and_has_no_optimizer_state(everything):
    _, _, _, first, _ = everything
    names = lambda tree: {  # noqa: E731
        key.key
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        for key in path
        if isinstance(key, jax.tree_util.DictKey)
    }
    assert not names(first.params) & set(balance.KINDS)
    assert not names(first.opt_state) & set(balance.KINDS)
    assert names(first.router_state) & set(balance.KINDS)


def test_evaluation_reads_the_state_and_leaves_it(everything):
    _, transformer, _, first, _ = everything
    variables = {"params": first.params, "router_state": first.router_state}
    batch = make_batch(seed=3)
    inputs = model.Inputs(jnp.asarray(batch.token_BL), jnp.asarray(batch.mask_BL))

    @jax.jit
    def run(variables):
        # Nothing may be written: flax raises where a collection that is not mutable is written to.
        transformer.apply(variables, inputs, train=False)
        return transformer.apply(variables, inputs, train=True, mutable=["router_state"])[1]

    chex.assert_trees_all_equal(run(variables)["router_state"], first.router_state)


def test_every_scope_but_the_global_batch_has_no_state():
    for kind in balance.KINDS:
        if issubclass(balance.module(kind).Mechanism, balancing.ScopedLoss):
            router = make_router("top_k")
            assert strong(kind, scope="micro_batch").init(router) == {}
            assert strong(kind, scope="sequence").init(router) == {}
            assert set(strong(kind).init(router)) > {"token_T"}
