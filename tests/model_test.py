"""The transformer: causality, cache, remat, scan, segments, sharing, counts, dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, make_config, make_inputs

from moelab import model, moe, size


@pytest.fixture(scope="module")
def built():
    """A dense layer, then two MoE layers with a shared expert, balanced by every mechanism."""
    config = make_config(
        model=dict(num_layers=3),
        moe=dict(num_dense_layers=1, num_shared_experts=1),
        balance=dict(
            switch_loss=dict(coefficient=0.01),
            z_loss=dict(coefficient=0.001),
            loss_free_bias=dict(rate=0.01),
        ),
    )
    transformer = model.from_config(config, VOCAB)
    return config, transformer, model.init(transformer, jax.random.key(0))


def forward(transformer, variables, inputs, **options):
    run = jax.jit(lambda v, i: transformer.apply(v, i, **options))
    return run(variables, inputs)


def test_shapes_reports_and_conservation(built):
    config, transformer, variables = built
    out = forward(transformer, variables, make_inputs(), trace=True)
    assert out.hidden_BLD.shape == (4, 16, 32)
    assert [s.count for s in transformer.segments] == [1, 2]
    assert out.reports[0] == {}
    report = out.reports[1]["block_0"]
    assert report.load_E.shape == (2, 4)
    # Dropless: every token reaches its k = 2 experts in each of the two layers.
    np.testing.assert_array_equal(report.load_E.sum(1), [4 * 16 * 2] * 2)
    np.testing.assert_array_equal(report.dropped, [0, 0])
    assert set(report.loss) == {"switch_loss", "z_loss"}
    assert set(report.observation) == {"switch_loss", "z_loss", "loss_free_bias"}
    assert report.trace.token_N.max() == 4 * 16 - 1


def test_layers_have_their_own_parameters(built):
    _, _, variables = built
    kernel = variables["params"]["segment_1"]["block_0"]["moe"]["router"]["kernel"]
    gate_up = variables["params"]["segment_1"]["block_0"]["moe"]["experts"]["gate_up"]
    assert kernel.shape == (2, 32, 4) and gate_up.shape == (2, 4, 64, 32)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    assert np.abs(gate_up[0] - gate_up[1]).max() > 0.01


@pytest.mark.parametrize("slots", [0, 2], ids=["routed", "Soft MoE"])
def test_routed_experts_alone_have_another_activation(slots):
    """Dense and shared feed-forwards stay SwiGLU: without what routed experts say, both models are the same."""
    moe_fields = dict(num_dense_layers=1, num_shared_experts=1, slots_per_expert=slots)

    def of(activation):
        config = make_config(model=dict(num_layers=2), moe=moe_fields | dict(activation=activation))
        return model.from_config(config, VOCAB)

    swiglu, clamped = of("swiglu"), of("gpt_oss")
    variables = model.init(swiglu, jax.random.key(0))
    a, b = (forward(m, variables, make_inputs()).hidden_BLD for m in (swiglu, clamped))
    assert np.abs(a - b).max() > 0.01
    experts = variables["params"]["segment_1"]["block_0"]["moe"]["experts"]
    experts["down"] = jnp.zeros_like(experts["down"])
    a, b = (forward(m, variables, make_inputs()).hidden_BLD for m in (swiglu, clamped))
    np.testing.assert_array_equal(a, b)


def test_no_output_depends_on_a_later_token(built):
    _, transformer, variables = built
    inputs = make_inputs()
    changed = inputs._replace(token_BL=inputs.token_BL.at[0, 9].set(3))
    a = forward(transformer, variables, inputs).hidden_BLD
    b = forward(transformer, variables, changed).hidden_BLD
    np.testing.assert_allclose(a[0, :9], b[0, :9], atol=1e-5)
    # Other sequences may change their place in an expert's window, so they agree to rounding.
    np.testing.assert_allclose(a[1:], b[1:], atol=1e-5)
    assert (np.abs(a[0, 9:] - b[0, 9:]).max(axis=1) > 1e-4).all()


def test_expert_choice_sees_the_future_and_says_so():
    config = make_config(router=dict(kind="expert_choice"))
    transformer = model.from_config(config, VOCAB)
    assert not transformer.segments[0].blocks[0].moe.router.causal
    variables = model.init(transformer, jax.random.key(0))
    inputs = make_inputs()
    changed = inputs._replace(token_BL=inputs.token_BL.at[0, 9:].set(3))
    a = forward(transformer, variables, inputs)
    b = forward(transformer, variables, changed).hidden_BLD
    assert np.abs(a.hidden_BLD[0, :9] - b[0, :9]).max() > 1e-5
    load = a.reports[0]["block_0"].load_E
    np.testing.assert_array_equal(load, np.full_like(load, 4 * 16 * 2 / 4))


def test_padding_changes_no_other_token(built):
    _, transformer, variables = built
    mask = np.ones((4, 16), bool)
    mask[2, 10:] = False
    inputs = make_inputs(mask=mask)
    other = inputs._replace(token_BL=inputs.token_BL.at[2, 10:].set(0))
    a, b = (forward(transformer, variables, i) for i in (inputs, other))
    np.testing.assert_array_equal(a.hidden_BLD[2, :10], b.hidden_BLD[2, :10])
    load = a.reports[1]["block_0"].load_E
    np.testing.assert_array_equal(load.sum(1), [2 * mask.sum()] * 2)
    np.testing.assert_array_equal(load, b.reports[1]["block_0"].load_E)


@pytest.mark.parametrize("chunks", [(16,), (5, 1, 1, 9)])
def test_cached_logits_equal_the_uncached(built, chunks):
    _, transformer, variables = built
    inputs = make_inputs(batch=2)
    wanted = forward(transformer, variables, inputs).hidden_BLD
    cache, got, start = {}, [], 0
    for length in chunks:
        part = inputs._replace(
            token_BL=inputs.token_BL[:, start : start + length],
            mask_BL=inputs.mask_BL[:, start : start + length],
        )
        out, cache = transformer.apply(variables | cache, part, cache_length=16, mutable=["cache"])
        got.append(out.hidden_BLD)
        start += length
    np.testing.assert_allclose(jnp.concatenate(got, 1), wanted, rtol=1e-4, atol=2e-5)


def test_remat_changes_no_gradient(built):
    config, transformer, variables = built
    inputs = make_inputs()

    def gradient(m):
        def total(params):
            out = m.apply({**variables, "params": params}, inputs, train=True)
            return jnp.sum(jnp.square(out.hidden_BLD - 1))

        return jax.jit(jax.grad(total))(variables["params"])

    wanted = gradient(transformer)
    got = gradient(transformer.clone(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), wanted, got)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(wanted))


def test_bfloat16_computes_near_float32_with_a_float32_router(built):
    config, transformer, variables = built
    half = dataclasses.replace(transformer, dtype=jnp.dtype("bfloat16"))
    a = forward(transformer, variables, make_inputs()).hidden_BLD
    out = forward(half, variables, make_inputs(), trace=True)
    assert out.hidden_BLD.dtype == jnp.bfloat16
    assert out.reports[1]["block_0"].trace.aux.logit_TC.dtype == jnp.float32
    # bfloat16 keeps 8 bits; a few tokens may change an expert, so compare the bulk.
    error = np.abs(np.asarray(a) - np.asarray(out.hidden_BLD, np.float32))
    assert np.median(error) < 0.02


def test_summary_counts_what_init_makes(built):
    config, transformer, variables = built
    found = size.count(config, VOCAB)
    sizes = [a.size for a in jax.tree.leaves(variables["params"])]
    assert found["parameters"]["total"] == sum(sizes)
    # Two MoE layers of 4 experts with 3 matrices of 32 x 32; 2 of 4 are active.
    assert found["parameters"]["expert"] == 2 * 4 * 3 * 32 * 32
    assert found["parameters"]["active"] == sum(sizes) - 2 * 2 * 3 * 32 * 32
    assert found["bytes"]["parameters"] == 4 * sum(sizes)
    attention = 4 * 16 * 32 * 3  # 4 * length * heads * head_dim per layer
    assert found["flops_per_token"]["forward"] == 2 * found["parameters"]["active"] + attention


def test_untied_head_and_dense_model():
    config = make_config(model=dict(tied_head=False), moe=dict(num_experts=0))
    transformer = model.from_config(config, VOCAB)
    variables = model.init(transformer, jax.random.key(0))
    assert model.head(transformer, variables["params"]) is variables["params"]["head"]
    out = forward(transformer, variables, make_inputs())
    assert out.reports == ({},)
    assert model.logits(transformer, variables["params"], out.hidden_BLD).shape == (4, 16, VOCAB)


def test_every_second_layer_is_sparse_and_scanned_as_one_pattern():
    config = make_config(model=dict(num_layers=5), moe=dict(num_dense_layers=1, every=2))
    assert model.moe_layers(config) == [2, 4]
    transformer = model.from_config(config, VOCAB)
    kinds = [(s.count, [b.moe is not None for b in s.blocks]) for s in transformer.segments]
    assert kinds == [(1, [False]), (2, [False, True])]
    out = forward(transformer, model.init(transformer, jax.random.key(0)), make_inputs())
    assert np.isfinite(out.hidden_BLD).all()


def test_capacity_drops_and_reports_the_share():
    config = make_config(moe=dict(capacity_factor=0.5))
    transformer = model.from_config(config, VOCAB)
    out = forward(transformer, model.init(transformer, jax.random.key(0)), make_inputs())
    report = out.reports[0]["block_0"]
    limit = int(np.ceil(0.5 * 4 * 16 * 2 / 4))
    assert (report.load_E <= limit).all()
    np.testing.assert_array_equal(report.load_E.sum(1) + report.dropped, [128, 128])
    assert (report.dropped >= 64).all()


def test_equal_blocks_are_hashable_and_equal(built):
    config, transformer, _ = built
    again = model.from_config(config, VOCAB)
    assert transformer.segments == again.segments
    assert hash(transformer.segments) == hash(again.segments)
    assert isinstance(transformer.segments[1].blocks[0].moe, moe.MoeConfig)
