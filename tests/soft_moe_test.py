"""Soft MoE against numpy (arXiv:2308.00951, eq. 1-3), its mask, its leak, its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax
from small_step import UNOPTIMISED
from tiny import VOCAB, make_config, make_inputs

from moelab import model


@pytest.fixture(scope="module")
def built():
    config = make_config(model=dict(num_layers=1), moe=dict(slots_per_expert=2))
    transformer = model.from_config(config, VOCAB)
    return transformer, model.init(transformer, jax.random.key(0))


@pytest.fixture(scope="module")
def block(built):
    """The block alone: a function of x and mask, and its parameters."""
    from moelab import soft_moe
    from moelab.model import _router_input

    transformer, variables = built
    config = transformer.segments[0].blocks[0].moe
    block = soft_moe.SoftMoeBlock(config, transformer.mesh)
    params = jax.tree.map(lambda a: a[0], variables["params"]["segment_0"]["block_0"]["moe"])

    def run(x_BLD, mask):
        inputs = model.Inputs(jnp.zeros(x_BLD.shape[:2], jnp.int32), jnp.asarray(mask))
        return block.apply({"params": params}, x_BLD, _router_input(inputs)._replace(train=False))

    return jax.jit(run, compiler_options=UNOPTIMISED), params


def unit(a, axis):
    return a / np.linalg.norm(a, axis=axis, keepdims=True)


def by_hand(params, x, num_experts=4, slots=2):
    """One sequence, float64: dispatch, experts one by one, combine."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    logit = unit(x, 1) @ (p["scale"] * unit(p["phi"], 0))
    inputs = softmax(logit, axis=0).T @ x
    outputs = np.zeros_like(inputs)
    for slot in range(num_experts * slots):
        e = slot // slots
        gate, up = np.split(p["experts"]["gate_up"][e] @ inputs[slot], 2)
        outputs[slot] = p["experts"]["down"][e] @ (gate * expit(gate) * up)
    return softmax(logit, axis=1) @ outputs


def test_conformance_to_the_equations(block):
    run, params = block
    x = np.random.default_rng(0).normal(size=(2, 10, 32))
    y, report, _ = run(jnp.asarray(x, jnp.float32), np.ones((2, 10), bool))
    wanted = np.stack([by_hand(params, sequence) for sequence in x])
    np.testing.assert_allclose(y, wanted, atol=2e-5)
    np.testing.assert_array_equal(report.load_E, [20] * 4)


def test_conservation_padding_is_neither_mixed_in_nor_answered(block):
    run, params = block
    x = np.random.default_rng(1).normal(size=(2, 10, 32))
    mask = np.ones((2, 10), bool)
    mask[0, 6:] = False
    mask[1] = False
    y, _, _ = run(jnp.asarray(x, jnp.float32), mask)
    np.testing.assert_allclose(y[0, :6], by_hand(params, x[0, :6]), atol=2e-5)
    np.testing.assert_array_equal(y[0, 6:], 0)
    np.testing.assert_array_equal(y[1], 0)


def test_invariance_to_the_other_sequences(block):
    """The group is the sequence: cut, reordered or beside more padding, each gives the same."""
    run, _ = block
    x_BLD = jnp.asarray(np.random.default_rng(2).normal(size=(2, 10, 32)), jnp.float32)
    mask = np.random.default_rng(3).random((2, 10)) < np.array([[1.0], [0.6]])
    both, *_ = run(x_BLD, mask)
    swapped, *_ = run(x_BLD[::-1], mask[::-1])
    halves = [run(x_BLD[i : i + 1], mask[i : i + 1])[0][0] for i in (0, 1)]
    for got in (swapped[::-1], jnp.stack(halves)):
        np.testing.assert_allclose(got, both, rtol=1e-5, atol=1e-6)


def test_causality_is_lost_and_said_and_every_part_learns(built):
    transformer, variables = built
    assert "later ones included" in transformer.leak
    inputs = make_inputs()
    changed = inputs._replace(token_BL=inputs.token_BL.at[0, 9].set(3))
    unoptimised = dict(compiler_options=UNOPTIMISED)
    run = jax.jit(lambda i: transformer.apply(variables, i).hidden_BLD, **unoptimised)
    assert np.abs(run(inputs)[0, :9] - run(changed)[0, :9]).max() > 1e-4

    def loss(params):
        return jnp.sum(jnp.square(transformer.apply({"params": params}, inputs).hidden_BLD[:, 3]))

    grads = jax.jit(jax.grad(loss), **unoptimised)(variables["params"])
    moe = grads["segment_0"]["block_0"]["moe"]
    for name in ("phi", "scale"):
        assert np.isfinite(moe[name]).all() and np.abs(moe[name]).max() > 0
