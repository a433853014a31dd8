"""The quality report against numpy: outputs from whole logits, routes and experts' errors from loops over tokens."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moelab import config as configs
from moelab import data, evaluate, quant
from moelab import model as model_lib
from moelab.errors import ConfigError
from moelab.quant import noise, quality, quality_steps, recipes
from moelab.report import statistics
from pallas_kernels import formats

WIDTH, HIDDEN, EXPERTS, K = 32, 32, 8, 2
CONFIG = dict(
    model=dict(num_layers=3, width=WIDTH, num_heads=2, num_kv_heads=1, head_dim=16, dense_width=64),
    moe=dict(num_experts=EXPERTS, expert_width=HIDDEN, num_dense_layers=1),
    router=dict(kind="top_k", k=K),
    train=dict(num_steps=4, batch_size=2, length=16),
    schedule=dict(warmup_steps=1),
    tokenizer=dict(kind="byte"),
    evaluation=dict(tokens_per_domain=300, batch_size=8),
)
SCHEMES = ("w4a16", "w4a4")


@pytest.fixture(scope="module")
def text(tmp_path_factory, request):
    """Two small domains of text of our own, and a cache of our own."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
    root = tmp_path_factory.mktemp("text")
    for domain, words in (("north", "snow and ice "), ("south", "sun or sand ")):
        (root / domain).mkdir()
        for i in range(100):
            (root / domain / f"{i}.txt").write_text(f"{i} " + words * (3 + i % 5))
    return root


@pytest.fixture(scope="module")
def setup(text):
    """An untrained model with a sharp head, packed in NVFP4, as subjects."""
    config = configs.from_dict(CONFIG | {"data": dict(kind="text", path=str(text))})
    dataset = data.build(config.data, config.tokenizer)
    plain = recipes.get("float32")
    model = evaluate.in_precision(config, dataset, plain)
    variables = model_lib.init(model, jax.random.key(1))
    reference = quality.Subject("float32", model, variables)
    rest, quantized = quant.pack(variables["params"], recipes.named("w4a16"))
    subjects = [_subject(config, dataset, variables, rest, quantized, name) for name in SCHEMES]
    found = quality.compare(config, dataset, "test", reference, subjects)
    return SimpleNamespace(
        config=config,
        dataset=dataset,
        reference=reference,
        subjects=subjects,
        quantized=quantized,
        batches=evaluate.batches_of(config, dataset, "test"),
        found=found,
    )


def _subject(config, dataset, variables, rest, quantized, name):
    recipe = recipes.named(name)
    packed, _ = evaluate.packed_variables(rest, quantized, variables["router_state"], recipe)
    return quality.Subject(name, evaluate.in_precision(config, dataset, recipe), packed)


@pytest.fixture(scope="module")
def runs(setup):
    """What each model does on each batch, with whole logits in float64: by name a list."""
    result = {}
    for subject in (setup.reference, *setup.subjects):
        apply = jax.jit(
            lambda variables, inputs, model=subject.model: model.apply(
                variables, inputs, trace=True, mutable=["calibration"]
            )
        )
        result[subject.name] = [_run(subject, apply, batch) for batch in setup.batches]
    return result


def _run(subject, apply, batch):
    inputs = model_lib.Inputs(batch.token_BL, batch.mask_BL, batch.domain_B)
    out, kept = apply(subject.variables, inputs)
    hidden = np.asarray(out.hidden_BLD, np.float64).reshape(-1, WIDTH)
    logits = hidden @ np.asarray(subject.variables["params"]["embedding"], np.float64).T
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    report = out.reports[1]["block_0"]  # the second segment: both sparse layers
    x = kept["calibration"]["segment_1"]["block_0"]["moe"]["x_TD"][0]
    return SimpleNamespace(
        log_p=log_p,
        mask=np.asarray(batch.mask_BL).reshape(-1),
        target=np.asarray(batch.target_BL).reshape(-1),
        document=np.asarray(batch.document_BL).reshape(-1),
        routing=jax.tree.map(np.asarray, report.trace),
        x=np.asarray(x),
    )


def over(runs, name, function):
    """One array of what a function makes of the pairs (reference, subject), batch after batch."""
    return np.concatenate(
        [function(*pair) for pair in zip(runs["float32"], runs[name], strict=True)]
    )


class TestSqnr:
    def test_by_hand(self):
        assert noise.sqnr(100.0, 1.0) == 20.0
        assert noise.sqnr(1.0, 2.0) == pytest.approx(-3.0103, abs=1e-4)
        assert noise.sqnr(1.0, 0.0) == math.inf
        assert math.isnan(noise.sqnr(0.0, 0.0)) and math.isnan(noise.sqnr(1.0, math.nan))


class TestWeights:
    def test_by_hand(self):
        # gate is off by 0.5 in 1 of 32 ones: 32 / 0.25; up is exact; down off by 1 in 2 of 64 twos: 256 / 2.
        gate = np.ones((1, 32), np.float32)
        off = gate.copy()
        off[0, 0] = 1.5
        down = np.full((2, 32), 2, np.float32)
        off_down = down.copy()
        off_down[:, 3] = 3
        plain = self.tree(np.concatenate([gate, gate]), down)
        packed = self.packed(np.concatenate([off, gate]), off_down)
        found = noise.weights(plain, packed)
        assert (
            found["gate"]["all"] == found["gate"]["layers"][0] == pytest.approx(10 * np.log10(128))
        )
        assert found["up"] == {"layers": [math.inf], "all": math.inf}
        assert found["down"]["all"] == pytest.approx(10 * np.log10(128))

    @staticmethod
    def tree(gate_up, down):
        leaves = {
            "gate_up": jnp.asarray(gate_up)[None, None],
            "down": jnp.asarray(down)[None, None],
        }
        return {"segment_0": {"block_0": {"moe": {"experts": leaves}}}}

    @classmethod
    def packed(cls, gate_up, down):
        tree = cls.tree(gate_up, down)
        return jax.tree.map(lambda w: formats.quantize(w, "mxfp4"), tree)  # exact here

    @pytest.mark.slow
    def test_layers_and_their_sum(self, setup):
        experts = setup.reference.variables["params"]["segment_1"]["block_0"]["moe"]["experts"]
        packed = setup.quantized["segment_1"]["block_0"]["moe"]["experts"]
        found = noise.weights(setup.reference.variables["params"], setup.quantized)
        w = np.asarray(experts["gate_up"], np.float64)
        q = np.asarray(formats.dequantize(packed["gate_up"]), np.float64)
        for name, rows in (("gate", slice(0, HIDDEN)), ("up", slice(HIDDEN, None))):
            signal = (w[:, :, rows] ** 2).sum((1, 2, 3))
            error = ((w - q)[:, :, rows] ** 2).sum((1, 2, 3))
            np.testing.assert_allclose(found[name]["layers"], 10 * np.log10(signal / error))
            wanted = 10 * np.log10(signal.sum() / error.sum())
            assert found[name]["all"] == pytest.approx(wanted)
        assert (
            18 < found["down"]["all"] < 22
        )  # NVFP4 of normal numbers: relative error 0.094, 20.5 dB

    def test_undoes_a_rotation_and_an_input_factor(self, setup):
        params = setup.reference.variables["params"]
        experts = params["segment_1"]["block_0"]["moe"]["experts"]
        scale = jnp.exp2(jnp.arange(WIDTH, dtype=jnp.float32) % 5 - 2)
        wide = {  # so fine that what is left is the transform
            "gate_up": experts["gate_up"] / scale[None, None, None],
            "down": experts["down"],
        }
        rotated = {n: formats.block_hadamard(w, 16) for n, w in wide.items()}
        for leaves, rotation in ((wide, None), (rotated, 16)):
            packed = {n: formats.quantize(w, "int8_channel") for n, w in leaves.items()}
            packed["input_scale"] = jnp.broadcast_to(scale[None], (2, WIDTH))
            tree = {"segment_1": {"block_0": {"moe": {"experts": packed}}}}
            found = noise.weights(params, tree, rotation)
            assert min(found[n]["all"] for n in noise.MATRICES) > 25
            assert noise.weights(params, tree, 32)["down"]["all"] < 5

    def test_layers_that_stay_plain_have_none(self, setup):
        params = setup.reference.variables["params"]
        found = noise.weights(params, {})
        assert found["gate"]["layers"] == [None, None] and math.isnan(found["gate"]["all"])


class TestAgainstItself:
    def test_nothing_differs(self, setup):
        twin = dataclasses.replace(setup.reference, name="twin")
        arguments = (setup.config, setup.dataset, "test", setup.reference, [twin])
        (found,) = quality.compare(*arguments)
        assert found["kl"] == {"mean": 0, "p99": 0}
        assert found["loss"][0] == found["loss"][1]
        assert found["loss_difference"] == {"estimate": 0, "low": 0, "high": 0}
        router = found["router"]
        assert router["overlap"] == router["same_order"] == [1, 1] and router["gate_kl"] == [0, 0]
        assert router["max_violation_before"] == router["max_violation_after"]
        assert found["output_sqnr_db"] == [math.inf, math.inf]
        assert found["load_error_rank"] == [None, None]


@pytest.mark.parametrize("row", range(len(SCHEMES)), ids=SCHEMES)
class TestAgainstNumpy:
    def test_divergence_of_the_outputs(self, setup, runs, row):
        kl = over(
            runs,
            SCHEMES[row],
            lambda a, b: (np.exp(a.log_p) * (a.log_p - b.log_p)).sum(1)[a.mask],
        )
        found = setup.found[row]
        assert found["tokens"] == kl.size
        # float32 logits: the divergence of about 1e-3 is a sum of differences near 1e-7
        assert found["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-3)
        assert found["kl"]["p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-3)
        assert found["kl"]["mean"] > 1e-5

    def test_losses_and_their_interval(self, setup, runs, row):
        part, found = setup.dataset.split("test"), setup.found[row]
        nats_D = {}
        for name in ("float32", SCHEMES[row]):
            nats_D[name] = np.zeros(len(part))
            for run in runs[name]:
                nats = -run.log_p[np.arange(run.target.size), run.target]
                np.add.at(nats_D[name], run.document[run.mask], nats[run.mask])
        used = nats_D["float32"] > 0
        assert found["documents"] == used.sum()
        pair = [nats_D[name][used] for name in ("float32", SCHEMES[row])]
        nbytes, domain_D = part.num_bytes_N[used], part.domain_N[used]
        for i in range(2):
            wanted = pair[i].sum() / np.log(2) / nbytes.sum()
            assert found["bits_per_byte"][i]["all"] == pytest.approx(wanted, rel=1e-6)
            assert found["loss"][i] == pytest.approx(pair[i].sum() / found["tokens"], rel=1e-6)
        wanted = statistics.ratio_difference(*pair, nbytes * np.log(2), domain_D)
        for name, value in wanted._asdict().items():
            assert found["bits_per_byte_difference"][name] == pytest.approx(value, rel=2e-3)
        estimate = found["bits_per_byte"][1]["all"] - found["bits_per_byte"][0]["all"]
        assert found["bits_per_byte_difference"]["estimate"] == pytest.approx(estimate, rel=1e-9)

    def test_router_agreement_token_by_token(self, setup, runs, row):
        router = setup.found[row]["router"]
        for m in range(2):
            both = order = kl = tokens = 0
            loads = np.zeros((2, EXPERTS))
            for a, b in zip(runs["float32"], runs[SCHEMES[row]], strict=True):
                for t in np.flatnonzero(a.mask):
                    mine, theirs = (r.routing.expert_N[m][t * K : (t + 1) * K] for r in (a, b))
                    both += len(set(mine.tolist()) & set(theirs.tolist()))
                    order += mine.tolist() == theirs.tolist()
                    for side, chosen in enumerate((mine, theirs)):
                        loads[side, chosen] += 1
                    p, q = (np.float64(r.routing.aux.prob_TC[m][t]) for r in (a, b))
                    kl += (p * np.log(p / q)).sum()
                    tokens += 1
            assert router["overlap"][m] == pytest.approx(both / (K * tokens))
            assert router["same_order"][m] == pytest.approx(order / tokens)
            assert router["gate_kl"][m] == pytest.approx(kl / tokens, rel=1e-3, abs=1e-8)
            worst = loads.max(1) / loads.mean(1) - 1
            assert router["max_violation_before"][m] == pytest.approx(worst[0])
            assert router["max_violation_after"][m] == pytest.approx(worst[1])
        # the first sparse layer sees what the reference sees; the second does not
        assert router["overlap"][0] == 1 > router["overlap"][1]

    def test_errors_of_the_experts_on_the_reference_s_rows(self, setup, runs, row):
        plain = setup.reference.variables["params"]["segment_1"]["block_0"]["moe"]["experts"]
        packed = setup.quantized["segment_1"]["block_0"]["moe"]["experts"]
        weights = {
            False: {n: np.asarray(w, np.float64) for n, w in plain.items()},
            True: {n: np.asarray(formats.dequantize(w), np.float64) for n, w in packed.items()},
        }
        found = setup.found[row]
        for m in range(2):
            error, power, rows = np.zeros(EXPERTS), np.zeros(EXPERTS), np.zeros(EXPERTS)
            layer_error = layer_power = 0
            for run in runs["float32"]:
                shape = (run.mask.size, WIDTH)
                combined, noise_TD = np.zeros(shape), np.zeros(shape)
                routing = run.routing
                for token, e, weight in zip(
                    routing.token_N[m], routing.expert_N[m], routing.weight_N[m], strict=True
                ):
                    if e == EXPERTS:
                        continue
                    x = run.x[m][token]
                    outputs = [
                        feed_forward(
                            x, weights[q]["gate_up"][m, e], weights[q]["down"][m, e], q and row == 1
                        )
                        for q in (False, True)
                    ]
                    error[e] += ((outputs[1] - outputs[0]) ** 2).sum()
                    power[e] += (outputs[0] ** 2).sum()
                    rows[e] += 1
                    combined[token] += weight * outputs[0]
                    noise_TD[token] += weight * (outputs[1] - outputs[0])
                layer_error, layer_power = (
                    layer_error + (noise_TD**2).sum(),
                    layer_power + (combined**2).sum(),
                )
            experts = found["experts"][m]
            assert experts["tokens"] == rows.tolist()
            np.testing.assert_allclose(experts["load"], rows / rows.sum())
            # with quantized activations a hidden value on the edge between two codes may fall on either side
            atol = 0.02 if row else 1e-4
            np.testing.assert_allclose(experts["sqnr_db"], 10 * np.log10(power / error), atol=atol)
            wanted = 10 * np.log10(layer_power / layer_error)
            assert found["output_sqnr_db"][m] == pytest.approx(wanted, abs=atol)
            rank = noise.rank_correlation(rows, power, error)
            assert found["load_error_rank"][m]["experts"] == (rows > 0).sum()
            if not row:
                assert found["load_error_rank"][m]["rho"] == pytest.approx(rank["rho"])


def feed_forward(x, gate_up, down, rounds):
    """One expert on one row, in float64; with rounded activations, each row with its own global scale."""
    x = nvfp4(x) if rounds else x
    gate, up = np.split(gate_up @ x.astype(np.float64), 2)
    hidden = gate / (1 + np.exp(-gate)) * up
    return down @ (nvfp4(hidden.astype(np.float32)) if rounds else hidden)


def nvfp4(x):
    """What a row becomes in NVFP4 with the amax of the row, by the formula of fp4 papers in numpy."""
    encode = np.float32(2688) / np.abs(x).max()
    blocks = x.reshape(-1, 16)
    ideal = np.abs(blocks).max(1, keepdims=True) * encode / np.float32(6)
    scale = ideal.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    step = scale / encode
    code = (blocks / np.where(step > 0, step, 1)).astype(ml_dtypes.float4_e2m1fn)
    return (code.astype(np.float64) * step).reshape(-1)


class TestOfTheRows:
    def test_activations_cost_more_than_weights_alone(self, setup):
        weight_only, both = setup.found
        assert [row["name"] for row in setup.found] == list(SCHEMES)
        pairs = zip(weight_only["output_sqnr_db"], both["output_sqnr_db"], strict=True)
        assert all(a > b + 1 for a, b in pairs)

    @pytest.mark.slow
    def test_chunks_of_logits_change_nothing(self, setup, monkeypatch):
        monkeypatch.setattr(
            quality_steps, "_LOGITS", 2 * 257 * 5
        )  # five tokens at a time, and a rest
        jax.clear_caches()
        model, variables = setup.reference.model, setup.reference.variables
        hidden = jax.random.normal(jax.random.key(0), (2, 13, WIDTH))
        head = model_lib.head(model, variables["params"])
        target = jnp.arange(13, dtype=jnp.int32)
        small = quality_steps.outputs((hidden[0], head), (hidden[1], head), target)
        monkeypatch.undo()
        jax.clear_caches()
        whole = quality_steps.outputs((hidden[0], head), (hidden[1], head), target)
        for a, b in zip(small, whole, strict=True):
            assert a.shape == (13,)
            np.testing.assert_allclose(a, b, rtol=1e-5)

    def test_a_model_without_routed_experts_is_refused(self, setup):
        for section in (dict(num_experts=0), dict(slots_per_expert=1)):
            config = configs.from_dict(CONFIG | {"moe": CONFIG["moe"] | section})
            with pytest.raises(ConfigError, match="wants a run with experts that a router"):
                quality.compare(config, setup.dataset, "test", setup.reference, [])

    @pytest.mark.slow
    def test_experts_that_choose_have_no_order(self, text):
        router = dict(kind="expert_choice", k=K)
        config = configs.from_dict(
            CONFIG
            | {"router": router, "data": dict(kind="text", path=str(text))}
            | {"model": CONFIG["model"] | {"num_layers": 2}}
        )
        dataset = data.build(config.data, config.tokenizer)
        model = evaluate.in_precision(config, dataset, recipes.get("float32"))
        variables = model_lib.init(model, jax.random.key(1))
        twin = quality.Subject("twin", model, variables)
        (found,) = quality.compare(config, dataset, "test", twin, [twin])
        assert found["router"]["same_order"] is None
        assert found["router"]["overlap"] == [1]


class TestRank:
    def test_by_hand(self):
        rows = np.array([1.0, 2, 3, 4])
        power = np.ones(4)
        assert noise.rank_correlation(rows, power, rows**2)["rho"] == pytest.approx(1)
        assert noise.rank_correlation(rows, power, 1 / rows)["rho"] == pytest.approx(-1)
        # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6
        found = noise.rank_correlation(rows, power, np.array([2.0, 1, 4, 3]))
        assert found["rho"] == pytest.approx(0.6) and found["experts"] == 4

    def test_the_error_is_relative(self):
        rows, error = np.array([1.0, 2, 3]), np.array([1.0, 1, 1])
        power = np.array([1.0, 2, 4])  # relative errors 1, 1/2, 1/4
        assert noise.rank_correlation(rows, power, error)["rho"] == pytest.approx(-1)

    @pytest.mark.parametrize(
        ("rows", "error"),
        [([1, 2, 0], [1, 2, 3]), ([2, 2, 2], [1, 2, 3]), ([1, 2, 3], [0, 0, 0])],
    )
    def test_nothing_to_rank(self, rows, error):
        rows, error = np.array(rows, float), np.array(error, float)
        assert noise.rank_correlation(rows, np.ones(3), error) is None
