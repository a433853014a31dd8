"""Calibration against a loop over tokens: Hessians, channel statistics, fallbacks, padding, drops; whole models."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptq_cases import experts_output, input_statistics, make_weights
from tiny import VOCAB, make_config

from moelab import model as model_lib
from moelab.data.loader import Batch
from moelab.errors import ConfigError
from moelab.quant import calibration, method, ptq, statistics
from pallas_kernels import formats

EXPERTS, WIDTH, HIDDEN = 5, 32, 16
WEIGHTS = make_weights(experts=EXPERTS, width=WIDTH, hidden=HIDDEN)


def make_assignments(seed=0, num_tokens=300):
    """Rows and assignments: expert 2 gets none, 4 two; ids E (dropped) and above (idle) are there too."""
    rng = np.random.default_rng(seed)
    x = (3 * rng.standard_normal((num_tokens, WIDTH)) + 1).astype(np.float32)
    expert = rng.choice([0, 1, 3, EXPERTS, EXPERTS + 1], (num_tokens, 2)).astype(np.int32)
    expert[[17, 60], 1] = 4
    token = np.repeat(np.arange(num_tokens, dtype=np.int32), 2)
    return x, token, expert.reshape(-1), rng.random(2 * num_tokens).astype(np.float32)


def collect(x, token, expert, weight, **options):
    return statistics.collect(
        *map(jnp.asarray, (x, token, expert, weight, WEIGHTS["gate_up"], WEIGHTS["down"])),
        **options,
    )


@pytest.mark.parametrize("window", [8, 128])
def test_sums_equal_a_loop_over_assignments(window):
    x, token, expert, weight = make_assignments()
    found = collect(x, token, expert, weight, window=window)
    square = np.zeros((2, EXPERTS, WIDTH, WIDTH))
    magnitude, largest = np.zeros((2, EXPERTS, WIDTH)), np.zeros((2, EXPERTS, WIDTH))
    count, total = np.zeros(EXPERTS), np.zeros(EXPERTS)
    for n, e in enumerate(expert):
        if e >= EXPERTS:
            continue
        count[e] += 1
        total[e] += weight[n]
        hidden = experts_output(WEIGHTS, x[token[n]][None], e)[1][0]
        for i, a in enumerate((x[token[n]].astype(np.float64), hidden)):
            k = len(a)
            square[i, e, :k, :k] += weight[n] * np.outer(a, a)
            magnitude[i, e, :k] += weight[n] * np.abs(a)
            largest[i, e, :k] = np.maximum(largest[i, e, :k], np.abs(a))
    np.testing.assert_array_equal(found.tokens_E, count)
    assert count[2] == 0 and count[4] == 2
    np.testing.assert_allclose(found.weight_E, total, rtol=1e-5)
    for i, (part, k) in enumerate(((found.gate_up, WIDTH), (found.down, HIDDEN))):
        scale = square[i].max()
        np.testing.assert_allclose(part.square_EKK, square[i, :, :k, :k], atol=1e-5 * scale)
        np.testing.assert_allclose(part.magnitude_EK, magnitude[i, :, :k], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(part.largest_EK, largest[i, :, :k], rtol=1e-4, atol=1e-6)


def test_two_batches_merged_are_one():
    x, token, expert, weight = make_assignments()
    whole = collect(x, token, expert, weight)
    parts = [collect(x, token[c], expert[c], weight[c]) for c in (slice(250), slice(250, None))]
    for a, b in zip(jax.tree.leaves(statistics.merge(*parts)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_no_assignments_at_all_are_zeros():
    x, token, expert, weight = make_assignments()
    found = collect(x, token, np.full_like(expert, EXPERTS), weight)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(found))
    done = statistics.finish(found, statistics.siblings(found), "siblings", 8)
    assert done.source_E == ("none",) * EXPERTS
    for inputs in (done.gate_up, done.down):
        assert not inputs.hessian_EKK.any() and not inputs.rank_E.any() and not inputs.amax_E.any()


def test_means_and_ranks_by_definition():
    x, token, expert, _ = make_assignments()
    found = collect(x, token, expert, np.ones(len(token), np.float32))
    done = statistics.finish(found, None, "siblings", 1)
    rows = [x[token[expert == e]] for e in (0, 1, 3, 4)]
    want = input_statistics(rows)
    chosen = [0, 1, 3, 4]
    scale = want.hessian_EKK.max()
    np.testing.assert_allclose(
        done.gate_up.hessian_EKK[chosen], want.hessian_EKK, atol=1e-5 * scale
    )
    np.testing.assert_allclose(done.gate_up.mean_abs_EK[chosen], want.mean_abs_EK, rtol=1e-4)
    np.testing.assert_array_equal(done.gate_up.max_abs_EK[chosen], want.max_abs_EK)
    np.testing.assert_array_equal(done.gate_up.amax_E[chosen], [np.abs(r).max() for r in rows])
    assert done.source_E[2] == "none" and done.gate_up.rank_E[2] == 0
    assert done.gate_up.rank_E[4] == 2 == done.down.rank_E[4]  # as many as rows
    assert (done.gate_up.rank_E <= WIDTH).all() and done.gate_up.rank_E[0] == WIDTH
    np.testing.assert_array_equal(done.gate_up.hessian_EKK, done.gate_up.hessian_EKK.swapaxes(1, 2))


def test_experts_with_few_rows_take_their_siblings():
    x, token, expert, _ = make_assignments()
    found = collect(x, token, expert, np.ones(len(token), np.float32))
    done = statistics.finish(found, statistics.siblings(found), "siblings", 10)
    assert done.source_E == ("own", "own", "siblings", "own", "siblings")
    np.testing.assert_array_equal(done.tokens_E[[2, 4]], [0, 2])  # what they saw, not what they got
    all_rows = x[token[expert < EXPERTS]]
    want = input_statistics([all_rows])
    for e in (2, 4):
        np.testing.assert_allclose(
            done.gate_up.hessian_EKK[e], want.hessian_EKK[0], atol=1e-5 * want.hessian_EKK.max()
        )
        np.testing.assert_allclose(done.gate_up.max_abs_EK[e], want.max_abs_EK[0])
    # down: nothing but the mean, since hidden channels of two experts have nothing to do with each other.
    hidden = np.concatenate(
        [experts_output(WEIGHTS, x[token[expert == e]], e)[1] for e in range(EXPERTS)]
    )
    np.testing.assert_allclose(
        done.down.hessian_EKK[2], np.eye(HIDDEN) * np.square(hidden).mean(), rtol=1e-4
    )
    np.testing.assert_allclose(done.down.mean_abs_EK[4], np.abs(hidden).mean(), rtol=1e-4)
    np.testing.assert_allclose(done.down.amax_E[2], np.abs(hidden).max(), rtol=1e-4)
    own = statistics.finish(found, None, "siblings", 1)
    np.testing.assert_array_equal(own.down.hessian_EKK[3], done.down.hessian_EKK[3])


# --- models ---------------------------------------------------------------------------------------

DATASET = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(vocab_size=VOCAB), token_counts=(1,) * VOCAB
)
# A dense block, then two MoE blocks of one segment: three repetitions would hide an order.
SECTIONS = dict(
    model=dict(num_layers=3), moe=dict(num_dense_layers=1, num_experts=8), router=dict(k=2)
)


def make_batch(seed, padding=0, batch=4, length=16):
    rng = np.random.default_rng(seed)
    token = rng.integers(0, VOCAB, (batch, length)).astype(np.int32)
    mask = np.ones((batch, length), bool)
    mask[-1, length - padding :] = False
    domain = np.zeros(batch, np.int32)
    return Batch(token, token, mask, domain, np.zeros_like(token))


def make_model(**sections):
    config = make_config(**(SECTIONS | sections))
    variables = model_lib.init(model_lib.from_dataset(config, DATASET), jax.random.key(0))
    return config, variables["params"], variables["router_state"]


def layers_of(config, params, router_state, batch):
    """Rows, routing and weights of each MoE layer, read off the model."""
    model = model_lib.from_dataset(config, DATASET, dtype="float32")
    inputs = model_lib.Inputs(batch.token_BL, batch.mask_BL, batch.domain_B)
    variables = {"params": params, "router_state": router_state}
    run = jax.jit(lambda v, x: model.apply(v, x, trace=True, mutable=["calibration"]))
    out, written = run(variables, inputs)
    for i, segment in enumerate(model.segments):
        for s in range(segment.count):
            for name in segment.sparse:
                (x,) = written["calibration"][f"segment_{i}"][name]["moe"]["x_TD"]
                routing = jax.tree.map(lambda leaf, s=s: leaf[s], out.reports[i][name].trace)
                experts = params[f"segment_{i}"][name]["moe"]["experts"]
                weights = {key: np.asarray(w[s]) for key, w in experts.items()}
                yield (i, int(name[-1]), s), np.asarray(x[s]), routing, weights


def looped(config, params, router_state, batches, gate_weighted=False):
    """Statistics of gate_up's inputs by a loop over batches, layers and assignments: Hessians, tokens, rows."""
    hessian, tokens, weight_of, hidden_of = {}, {}, {}, {}
    for batch in batches:
        for layer, x, routing, weights in layers_of(config, params, router_state, batch):
            experts, width = len(weights["down"]), x.shape[1]
            hessian.setdefault(layer, np.zeros((experts, width, width)))
            hidden_width = weights["down"].shape[2]
            hidden_of.setdefault(layer, np.zeros((experts, hidden_width, hidden_width)))
            tokens.setdefault(layer, np.zeros(experts))
            weight_of.setdefault(layer, np.zeros(experts))
            valid = np.asarray(batch.mask_BL).reshape(-1)
            for t, e, w in zip(routing.token_N, routing.expert_N, routing.weight_N, strict=True):
                if e < experts:
                    assert valid[t]
                    r = float(w) ** 2 if gate_weighted else 1.0
                    row = x[t].astype(np.float64)
                    _, hidden = experts_output(weights, row[None], e)
                    hessian[layer][e] += r * np.outer(row, row)
                    hidden_of[layer][e] += r * np.outer(hidden[0], hidden[0])
                    tokens[layer][e] += 1
                    weight_of[layer][e] += r
    for layer, total in weight_of.items():
        divisor = np.where(total > 0, total, 1)[:, None, None]
        hessian[layer] /= divisor
        hidden_of[layer] /= divisor
    return hessian, hidden_of, tokens


def assert_close(found, want):
    np.testing.assert_allclose(found, want, atol=2e-5 * max(np.abs(want).max(), 1e-9))


@pytest.mark.parametrize("gate_weighted", [False, True])
def test_a_model_equals_a_loop_over_its_tokens(gate_weighted):
    config, params, state = make_model()
    batches = [make_batch(0), make_batch(1, padding=9)]
    found = calibration.calibrate(
        config, DATASET, params, state, batches, min_tokens=1, gate_weighted=gate_weighted
    )
    hessian, hidden, tokens = looped(config, params, state, batches, gate_weighted)
    assert list(found) == list(hessian) and len(found) == 2
    for layer, done in found.items():
        own = np.array([source == "own" for source in done.source_E])
        np.testing.assert_array_equal(done.tokens_E, tokens[layer])
        assert done.tokens_E.sum() == 2 * (128 - 9)  # padding is routed nowhere
        assert_close(done.gate_up.hessian_EKK[own], hessian[layer][own])
        assert_close(done.down.hessian_EKK[own], hidden[layer][own])


def test_interleaved_blocks_come_in_their_order():
    config, params, state = make_model(model=dict(num_layers=4), moe=dict(num_experts=4, every=2))
    found = calibration.calibrate(config, DATASET, params, state, [make_batch(0)], min_tokens=1)
    hessian, _, _ = looped(config, params, state, [make_batch(0)])
    assert list(found) == list(hessian)
    assert len(found) == len(model_lib.moe_layers(config))
    for layer, done in found.items():
        own = np.array([source == "own" for source in done.source_E])
        assert_close(done.gate_up.hessian_EKK[own], hessian[layer][own])


def test_layers_are_listed_repetition_by_repetition_and_block_by_block():
    sparse, dense = types.SimpleNamespace(moe=True), types.SimpleNamespace(moe=None)
    segment = types.SimpleNamespace(count=2, blocks=(sparse, dense, sparse))
    model = types.SimpleNamespace(segments=(segment,))
    total = {"0/0": np.array([10, 11]), "0/2": np.array([20, 21])}
    found = calibration._by_layer(model, total)
    assert list(found) == [(0, 0, 0), (0, 2, 0), (0, 0, 1), (0, 2, 1)]
    assert [int(value) for value in found.values()] == [10, 20, 11, 21]


@pytest.mark.slow
def test_dropped_assignments_do_not_count():
    config, params, state = make_model(
        moe=dict(num_experts=8, num_dense_layers=1, capacity_factor=0.5)
    )
    found = calibration.calibrate(config, DATASET, params, state, [make_batch(0)], min_tokens=1)
    hessian, _, tokens = looped(config, params, state, [make_batch(0)])
    for layer, done in found.items():
        np.testing.assert_array_equal(done.tokens_E, tokens[layer])
        assert done.tokens_E.sum() <= 64  # half of 2 * 64
        own = np.array([source == "own" for source in done.source_E])
        assert_close(done.gate_up.hessian_EKK[own], hessian[layer][own])


@pytest.mark.slow
def test_expert_choice_is_collected_too():
    config, params, state = make_model(router=dict(kind="expert_choice"))
    found = calibration.calibrate(config, DATASET, params, state, [make_batch(2)], min_tokens=1)
    hessian, _, _ = looped(config, params, state, [make_batch(2)])
    for layer, done in found.items():
        assert_close(done.gate_up.hessian_EKK, hessian[layer])


def test_all_tokens_go_through_experts_that_saw_few():
    config, params, state = make_model()
    batches = [make_batch(0), make_batch(1, padding=9)]
    found = calibration.calibrate(
        config, DATASET, params, state, batches, min_tokens=30, fallback="all_tokens"
    )
    _, _, tokens = looped(config, params, state, batches)
    rows = {}
    for batch in batches:
        valid = batch.mask_BL.reshape(-1)
        for layer, x, _, weights in layers_of(config, params, state, batch):
            rows.setdefault(layer, []).append((x[valid], weights))
    few = [(tokens[layer] < 30).sum() for layer in found]
    assert min(few) != max(few)  # layers with different numbers of such experts
    for layer, done in found.items():
        x = np.concatenate([part for part, _ in rows[layer]])
        weights = rows[layer][0][1]
        for e, source in enumerate(done.source_E):
            assert source == ("all_tokens" if tokens[layer][e] < 30 else "own")
            if source == "own":
                continue
            want = input_statistics([x, experts_output(weights, x, e)[1]][:1])
            assert_close(done.gate_up.hessian_EKK[e], want.hessian_EKK[0])
            hidden = experts_output(weights, x, e)[1]
            assert_close(done.down.hessian_EKK[e], hidden.T @ hidden / len(hidden))
    np.testing.assert_array_equal(done.tokens_E, tokens[layer])


def test_coverage_names_every_fallback():
    config, params, state = make_model()
    found = calibration.calibrate(config, DATASET, params, state, [make_batch(0)], min_tokens=16)
    table = calibration.coverage(found)
    assert [row["layer"] for row in table] == ["segment_1/block_0/0", "segment_1/block_0/1"]
    for row, done in zip(table, found.values(), strict=True):
        assert row["tokens"] == done.tokens_E.tolist() and sum(row["tokens"]) == 128
        assert sum(row["experts_by_tokens"].values()) == 8
        few = [e for e, n in enumerate(row["tokens"]) if n < 16]
        assert row["fallbacks"] == ({"siblings": few} if few else {}) and few
        assert row["down"]["width"] == 32 and len(row["down"]["rank"]) == 8
        assert calibration.name_of((1, 0, 0)) == "segment_1/block_0/0"
    lines = calibration.coverage_table(found).splitlines()
    assert len(lines) == 3 and "siblings" in lines[1] and lines[1].startswith("segment_1/block_0/0")


def test_the_histogram_by_hand():
    counts = np.array([0, 0, 1, 9, 10, 99, 100, 2000])
    want = {"0": 2, "1-9": 2, "10-99": 2, "100-999": 1, "1000-9999": 1}
    assert calibration._histogram(counts) == want


def test_a_batch_of_padding_leaves_nothing_and_says_so():
    config, params, state = make_model()
    batch = make_batch(0)._replace(mask_BL=np.zeros((4, 16), bool))
    for fallback in calibration.FALLBACKS:
        found = calibration.calibrate(config, DATASET, params, state, [batch], fallback=fallback)
        for done in found.values():
            assert done.source_E == ("none",) * 8
        assert calibration.coverage(found)[0]["fallbacks"] == {"none": list(range(8))}
        _, quantized, report = ptq.quantize_params(params, ptq.make("gptq"), found, "nvfp4")
        packed = jax.tree.leaves(quantized, is_leaf=lambda q: hasattr(q, "codes"))
        assert all(np.isfinite(formats.dequantize(q)).all() for q in packed)
        assert report["layers"]["segment_1/block_0/1"]["source"] == ["none"] * 8


def test_bad_input_is_one_clear_error():
    config, params, state = make_model()
    run = lambda config, batches, **options: calibration.calibrate(  # noqa: E731
        config, DATASET, params, state, batches, **options
    )
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        run(config, [])
    with pytest.raises(ValueError, match="unknown fallback 'none'; allowed: siblings, all_tokens"):
        run(config, [make_batch(0)], fallback="none")
    with pytest.raises(ValueError, match="min_tokens must be at least 1, got 0"):
        run(config, [make_batch(0)], min_tokens=0)
    with pytest.raises(ConfigError, match="moe.num_experts is 0"):
        run(make_config(moe=dict(num_experts=0)), [make_batch(0)])
    with pytest.raises(ConfigError, match="moe.slots_per_expert: Soft MoE"):
        run(make_config(moe=dict(slots_per_expert=1)), [make_batch(0)])
    with pytest.raises(ConfigError, match="moe.activation=gpt_oss: calibration"):
        run(make_config(moe=dict(activation="gpt_oss")), [make_batch(0)])
    params["embedding"] = params["embedding"].at[:].set(jnp.nan)
    with pytest.raises(
        ValueError, match="inputs of gate_up in layer segment_1/block_0/0 are not finite"
    ):
        run(config, [make_batch(0)])


# --- whole trees ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_quantized_trees_have_the_shape_of_pack():
    config, params, state = make_model(model=dict(num_layers=3, width=64))
    found = calibration.calibrate(config, DATASET, params, state, [make_batch(0)], min_tokens=4)
    rest, quantized, report = ptq.quantize_params(params, ptq.make("smoothquant"), found, "nvfp4")
    assert quantized.keys() == {"segment_1"}
    experts = quantized["segment_1"]["block_0"]["moe"]["experts"]
    plain = params["segment_1"]["block_0"]["moe"]["experts"]
    assert experts.keys() == {"gate_up", "down", method.INPUT_SCALE}
    assert experts[method.INPUT_SCALE].shape == (2, 64)
    for name, w in plain.items():
        assert experts[name].shape == w.shape and experts[name].global_amax.shape == w.shape[:2]
    assert "experts" not in rest["segment_1"]["block_0"]["moe"]
    assert rest["segment_1"]["block_0"]["moe"].keys() == {"router"}
    assert rest["segment_0"] == params["segment_0"] and rest["embedding"] is params["embedding"]
    assert report["format"] == "nvfp4" and report["rule"] == "amax" and report["rotation"] is None
    layer = report["layers"]["segment_1/block_0/1"]
    assert layer["tokens"] == found[1, 0, 1].tokens_E.tolist() and len(layer["source"]) == 8
    # The second repetition is what the method makes of it.
    alone = ptq.make("smoothquant").quantize(
        {k: w[1] for k, w in plain.items()}, found[1, 0, 1], "nvfp4"
    )
    for name, q in alone.weights.items():
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(experts[name]), strict=True):
            np.testing.assert_array_equal(a, b[1])


def test_rtn_of_a_tree_is_quantize_and_errors_have_the_path():
    _, params, _ = make_model()
    _, quantized, _ = ptq.quantize_params(params, ptq.make("rtn"), None, "mxfp4", "even")
    for name, w in params["segment_1"]["block_0"]["moe"]["experts"].items():
        want = formats.quantize(w, "mxfp4", rule="even", num_batch_axes=2)
        found = quantized["segment_1"]["block_0"]["moe"]["experts"][name]
        np.testing.assert_array_equal(found.codes, want.codes)
        np.testing.assert_array_equal(found.scales, want.scales)
    with pytest.raises(
        ValueError, match="segment_1/block_0/0/moe/experts cannot .* needs statistics"
    ):
        ptq.quantize_params(params, ptq.make("gptq"), None, "nvfp4")
    with pytest.raises(ValueError, match="statistics have no layer segment_1/block_0/0"):
        ptq.quantize_params(params, ptq.make("gptq"), {}, "nvfp4")
    with pytest.raises(ValueError, match="params have no experts"):
        ptq.quantize_params(
            {"segment_0": {"block_0": {"dense": {}}}}, ptq.make("rtn"), None, "nvfp4"
        )
