"""What goes from layer to layer, from step to step, and from the data to a router."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_step import NARROW, UNOPTIMISED, VOCAB, small_config
from tiny import make_config, make_inputs

from moelab import balance, blocks, model, router_state, routers, train


def compiled(function):
    return jax.jit(function, compiler_options=UNOPTIMISED)


def two_layers(kind):
    """A narrow model of two MoE layers of this router in one scan, and its variables."""
    config = make_config(
        model=NARROW | dict(num_layers=2), moe=dict(expert_width=16), router=dict(kind=kind)
    )
    transformer = model.from_config(config, VOCAB)
    shapes = jax.eval_shape(lambda: model.init(transformer, jax.random.key(0)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda a: draw.normal(size=a.shape).astype(np.float32), shapes["params"])
    return transformer, params


def traced(transformer, params, key):
    """What both layers' routers saw and compared: RoutingAux with a leading axis of layers."""
    inputs = make_inputs(2, 8)._replace(key=key)
    out = transformer.apply({"params": params}, inputs, train=True, trace=True)
    return out.reports[0]["block_0"].trace.aux


def test_the_gating_residual_reads_the_logits_of_the_layer_before():
    """MoE++, arXiv:2410.07348, section 3.2: z_1 = x W + z_0 R; the layers' x do not depend on the last R."""
    transformer, params = two_layers("zero_computation")
    router = params["segment_0"]["block_0"]["moe"]["router"]
    key = jnp.zeros(2, jnp.uint32)
    run = compiled(lambda params: traced(transformer, params, key).logit_TC)
    with_residual = run(params)
    residual_LCC = router["residual"]
    last_CC = residual_LCC[1]
    # A new array: a run may still read the old one, which jax takes as it is.
    router["residual"] = residual_LCC * np.array([1, 0], np.float32)[:, None, None]
    without = run(params)
    np.testing.assert_array_equal(with_residual[0], without[0])
    wanted = np.asarray(without[0]) @ last_CC
    np.testing.assert_allclose(with_residual[1] - without[1], wanted, rtol=1e-3, atol=1e-3)
    assert np.abs(wanted).max() > 1


def test_noise_is_another_in_every_layer_and_step():
    """With kernels of zeros the noisy logits are ln 2 times the noise."""
    transformer, params = two_layers("noisy_top_k")
    router = params["segment_0"]["block_0"]["moe"]["router"]
    router.update({name: np.zeros_like(a) for name, a in router.items()})
    run = compiled(lambda params, key: traced(transformer, params, key).rank_TC)
    keys = [jnp.array([0, seed], jnp.uint32) for seed in (1, 2)]
    noises = [np.asarray(layer) for key in keys for layer in run(params, key)]
    for i, one in enumerate(noises):
        assert 0.4 < np.std(one) < 1.0  # ln 2 is 0.69
        assert all(abs(np.corrcoef(one.ravel(), b.ravel())[0, 1]) < 0.5 for b in noises[:i])


def updated(kind, name, statistics, **fields):
    """The two layers' state after a step in which they reported these statistics."""
    config = small_config("remoe" if kind == "relu_l1" else "top_k")
    segment = model.from_config(config, VOCAB).segments[0]
    mechanism = balance.make(kind, **fields)
    block = segment.blocks[0]
    sparse = SimpleNamespace(mechanisms=((kind, mechanism),), router=block.moe.router)
    segment = blocks.Segment(count=2, blocks=(SimpleNamespace(moe=sparse),))
    old = jax.tree.map(lambda a: jnp.stack([a, a]), mechanism.init(block.moe.router))
    report = SimpleNamespace(observation={kind: statistics})
    rows = ({"block_0": {kind: {}}},)
    state = {"segment_0": {"block_0": {"moe": {kind: old}}}}
    built = SimpleNamespace(segments=(segment,))
    new = router_state.update(built, state, ({"block_0": report},), rows)
    return np.asarray(new["segment_0"]["block_0"]["moe"][kind][name])


def test_remoe_has_one_coefficient_for_all_layers():
    """k / C is 2 of 4: of 32 gates 16 should be open; 4 + 9 are, so both layers relax. Alone, the second would not."""
    statistics = {"open": jnp.array([4.0, 9.0]), "gates": jnp.array([16.0, 16.0])}
    found = updated("relu_l1", "coefficient", statistics, coefficient=0.3)
    np.testing.assert_allclose(found, [0.3 / 1.2] * 2, rtol=1e-6)


def test_other_controllers_have_a_state_per_layer():
    count_MC = jnp.array([[10.0, 2.0, 2.0, 2.0], [2.0, 10.0, 2.0, 2.0]])
    state = balance.make("loss_free_bias", rate=0.1)
    router = routers.make("top_k", num_experts=4)
    assert not state.across_layers and set(state.init(router)) == {"bias_C"}
    found = updated("loss_free_bias", "bias_C", {"count_C": count_MC}, rate=0.1)
    assert found[0, 0] < 0 < found[0, 1] and found[1, 1] < 0 < found[1, 0]


@pytest.mark.parametrize("table", ["random", "balanced"])
def test_hash_tables_go_by_the_counts_of_the_data(table):
    counts = tuple(int(c) for c in 1000 // np.arange(1, VOCAB + 1))
    dataset = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=VOCAB), token_counts=counts)
    config = small_config("hash", table=table, k=1)
    built = model.from_dataset(config, dataset)
    router = built.segments[0].blocks[0].moe.router
    assert router.token_counts == counts
    table_VK = np.asarray(
        routers.module("hash").balanced_table(router.token_counts, 4, 1, 0)
    )  # the most frequent id alone has a fifth of all tokens
    load_E = np.bincount(table_VK[:, 0], counts, minlength=4)
    assert load_E.max() / load_E.mean() < 1.01


class _Enough(Exception):
    """The session has come as far as this test needs."""


@pytest.mark.parametrize("factor, warned", [(1.0, True), (0.0, False)])
def test_a_run_warns_that_its_model_is_not_causal(monkeypatch, tmp_path, capsys, factor, warned):
    def stop(*_, **__):
        raise _Enough

    monkeypatch.setattr(train.checkpoint, "Checkpoints", stop)
    dataset = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=VOCAB))
    config = small_config(moe=dict(capacity_factor=factor))
    with pytest.raises(_Enough):
        train._Session(config, tmp_path, dataset, "auto")
    printed = capsys.readouterr().err
    assert ("not a causal language model: under a capacity" in printed) == warned
