"""The model under a recipe: every role rounds what it says and nothing else, and layers may stay in high precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, make_config, make_inputs

from moelab import config as configs
from moelab import evaluate, model, quant
from moelab.quant import config_check, linear, precisions, recipes
from pallas_kernels import formats

CONFIG = make_config(
    moe=dict(num_shared_experts=1, num_dense_layers=1), model=dict(tied_head=False)
)


@functools.cache
def variables():
    return model.init(model.from_config(CONFIG, VOCAB), jax.random.key(0))


def output(recipe, inputs=None, config=CONFIG, params=None):
    """Logits of the model under a recipe."""
    transformer = model.from_config(config, VOCAB, recipe=recipe)
    given = variables() | ({} if params is None else {"params": params})

    @jax.jit
    def run(given, inputs):
        hidden = transformer.apply(given, inputs).hidden_BLD
        return model.logits(transformer, given["params"], hidden)

    return np.asarray(run(given, inputs or make_inputs()))


def of_roles(*roles):
    return recipes.named("none", roles=roles)


PLAIN = recipes.named("none")
EVERY_ROLE = [
    f"{role}.{part}=nvfp4"
    for role, parts in recipes.ROLES.items()
    for part in parts
    if part != "gradient"
]


@pytest.mark.slow
@pytest.mark.parametrize("role", EVERY_ROLE)
def test_every_role_changes_the_output_a_little(role):
    plain, rounded = output(PLAIN), output(of_roles(role))
    error = np.linalg.norm(rounded - plain) / np.linalg.norm(plain)
    assert 1e-5 < error < 0.3


@pytest.mark.parametrize(
    ("role", "path", "axis"),
    [
        ("embedding", ("embedding",), "row"),
        ("head", ("head",), "matrix"),
        ("router", ("segment_1", "block_0", "moe", "router", "kernel"), "column"),
        ("attention", ("segment_0", "block_0", "attention", "output"), "matrix"),
    ],
)
def test_a_weight_role_is_the_plain_model_with_rounded_weights(role, path, axis):
    params = jax.tree.map(lambda a: a, variables()["params"])
    names = [path]
    if role == "attention":
        names = [
            (f"segment_{s}", "block_0", "attention", name)
            for s in range(2)
            for name in ("query", "key", "value", "output")
        ]
    for name in names:
        folder = params
        for key in name[:-1]:
            folder = folder[key]
        leaf = folder[name[-1]]
        if axis == "column":  # a router's kernel contracts its first axis, below the scan's
            moved = jnp.swapaxes(leaf, -1, -2)
            folder[name[-1]] = jnp.swapaxes(_rounded(moved, moved.ndim - 2), -1, -2)
        else:
            folder[name[-1]] = _rounded(leaf, leaf.ndim - (1 if axis == "row" else 2))
    want = output(PLAIN, params=params)
    np.testing.assert_allclose(output(of_roles(f"{role}.weight=nvfp4")), want, rtol=1e-5, atol=1e-6)


def _rounded(leaf, num_batch_axes):
    return formats.dequantize(formats.quantize(leaf, "nvfp4", num_batch_axes=num_batch_axes))


@pytest.mark.slow
def test_no_recipe_lets_a_token_see_a_later_one():
    inputs = make_inputs()
    token = np.array(inputs.token_BL)
    token[:, 10:] = (token[:, 10:] + 7) % VOCAB
    later = inputs._replace(token_BL=jnp.asarray(token))
    for name in recipes.NAMED:
        recipe = recipes.named(name, roles=tuple(EVERY_ROLE) if name == "w4a4" else ())
        a, b = output(recipe, inputs), output(recipe, later)
        np.testing.assert_allclose(a[:, :10], b[:, :10], rtol=1e-5, atol=1e-5)
        assert np.abs(a[:, 10:] - b[:, 10:]).max() > 1e-3


@pytest.mark.slow
def test_a_cached_step_reads_the_rounded_cache():
    recipe = of_roles("kv_cache.activation=nvfp4")
    transformer = model.from_config(CONFIG, VOCAB, recipe=recipe)
    inputs = make_inputs(batch=1)
    whole = transformer.apply(variables(), inputs).hidden_BLD
    cache = {}
    for i in range(16):
        one = model.Inputs(inputs.token_BL[:, i : i + 1], jnp.ones((1, 1), bool))
        out, cache = transformer.apply(variables() | cache, one, cache_length=16, mutable=["cache"])
    np.testing.assert_allclose(out.hidden_BLD[:, 0], whole[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "nvfp4_training" else pytest.mark.slow)
        for name in recipes.NAMED
        if name != "none"
    ],
)
def test_gradients_reach_every_parameter(name):
    transformer = model.from_config(CONFIG, VOCAB, recipe=recipes.named(name))
    inputs = make_inputs()

    @jax.jit
    @jax.grad
    def gradient(params):
        out = transformer.apply(variables() | {"params": params}, inputs, train=True)
        return jnp.mean(jax.nn.logsumexp(model.logits(transformer, params, out.hidden_BLD), -1))

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables()["params"])):
        assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


def test_stochastic_gradients_are_a_function_of_the_key():
    transformer = model.from_config(CONFIG, VOCAB, recipe=recipes.named("nvfp4_training"))

    @jax.jit
    def gradient(key):
        inputs = make_inputs()._replace(key=key)

        def loss(params):
            out = transformer.apply(variables() | {"params": params}, inputs, train=True)
            return jnp.sum(out.hidden_BLD[..., 0])

        return jax.grad(loss)(variables()["params"])["segment_1"]["block_0"]["moe"]["experts"][
            "down"
        ]

    keys = [jnp.array([0, i], jnp.uint32) for i in range(2)]
    np.testing.assert_array_equal(gradient(keys[0]), gradient(keys[0]))
    assert np.any(gradient(keys[0]) != gradient(keys[1]))


def test_layers_that_stay_in_high_precision():
    config = make_config(model=dict(num_layers=5), quantization=dict(first_layers=1, last_layers=2))
    recipe = recipes.named("nvfp4_qat")
    quantized = model.from_config(config, VOCAB, recipe=recipe)
    plain = model.from_config(config, VOCAB)
    blocks = [b for s in quantized.segments for b in s.blocks * s.count]
    assert [b.moe.precision is None for b in blocks] == [True, False, False, True, True]
    # The same segments and parameters with and without the recipe, so that one can follow the other.
    shapes = [
        jax.eval_shape(lambda m=m: model.init(m, jax.random.key(0))) for m in (quantized, plain)
    ]
    assert shapes[0] == shapes[1]
    assert quantized.kept_blocks == {("segment_0", "block_0"), ("segment_2", "block_0")}
    given = model.init(plain, jax.random.key(0))
    packed, _ = evaluate.variables_of(
        given["params"], {}, recipes.get("nvfp4_wa"), plain.kept_blocks
    )
    assert packed["quantized"].keys() == {"segment_1"}
    assert "experts" in packed["params"]["segment_0"]["block_0"]["moe"]


def test_evaluation_from_packed_experts_is_fake_quantization():
    recipe = recipes.named("w4a4")
    rest, quantized = quant.pack(variables()["params"], recipe)
    given, _ = evaluate.packed_variables(rest, quantized, {}, recipe)
    transformer = model.from_config(CONFIG, VOCAB, recipe=evaluate.executed(recipe))
    hidden = transformer.apply(given, make_inputs()).hidden_BLD
    packed = np.asarray(model.logits(transformer, given["params"], hidden))
    np.testing.assert_allclose(packed, output(recipe), rtol=1e-5, atol=1e-5)


def test_rotated_experts_are_close_to_plain_ones_and_packed_alike():
    recipe = recipes.Recipe(
        name="r",
        label="r",
        rotation=32,
        **recipes.experts(recipes.Formats(weight="mxfp4", activation="mxfp4")),
    )
    rest, quantized = quant.pack(variables()["params"], recipe)
    given, _ = evaluate.packed_variables(rest, quantized, {}, recipe)
    transformer = model.from_config(CONFIG, VOCAB, recipe=evaluate.executed(recipe))
    hidden = transformer.apply(given, make_inputs()).hidden_BLD
    packed = np.asarray(model.logits(transformer, given["params"], hidden))
    plain, fake = output(PLAIN), output(recipe)
    assert np.linalg.norm(fake - plain) < 0.3 * np.linalg.norm(plain)
    np.testing.assert_allclose(packed, fake, rtol=1e-4, atol=1e-5)


def test_precisions_of_roles():
    recipe = recipes.named("nvfp4_training")
    experts = precisions.experts(recipe)
    assert experts.down.hadamard == 16 and experts.needs_key
    assert precisions.of_role(recipe, "attention") is None
    assert precisions.experts(PLAIN) is None
    static = recipes.Recipe(
        name="s",
        label="s",
        activation_scale="static",
        shared_experts=recipes.Formats(activation="nvfp4"),
        **recipes.experts(recipes.Formats(weight="nvfp4", activation="nvfp4")),
    )
    assert precisions.experts(static).gate_up.x_scale == "static"
    assert precisions.of_role(static, "shared_experts").x_scale == "per_token"  # nothing calibrated


def test_rounding_along_an_axis():
    x = jax.random.normal(jax.random.key(1), (3, 32, 5))
    got = linear.rounded(x, "nvfp4", axis=1)
    want = jnp.stack([_rounded(x[i].T, 1).T for i in range(3)])
    np.testing.assert_array_equal(got, want)
    gradient = jax.grad(lambda x: jnp.sum(linear.rounded(x, "nvfp4", axis=1) * 3))(x)
    np.testing.assert_array_equal(gradient, jnp.full(x.shape, 3.0))


def problems(**quantization):
    sections = {k: quantization.pop(k) for k in ("model", "moe", "train") if k in quantization}
    config = configs.from_dict(
        {"tokenizer": {"kind": "byte"}, "quantization": quantization} | sections
    )
    return dict(config_check.problems(config))


@pytest.mark.parametrize(
    ("fields", "path", "message"),
    [
        (dict(recipe="nvfp4_qta"), "quantization.recipe", "did you mean 'nvfp4_qat'"),
        (dict(recipe="w4a4", format="fp5"), "quantization.format", "choose from nvfp4"),
        (dict(roles=("rooter.weight=nvfp4",)), "quantization.roles", "did you mean 'router'"),
        (dict(roles=("router.weight=fp5",)), "quantization.roles", "has no format 'fp5'"),
        (
            dict(roles=("shared_experts.weight=nvfp4",)),
            "quantization.roles",
            "names shared_experts, which this model does not have",
        ),
        (
            dict(recipe="w4a16", moe=dict(num_experts=0)),
            "quantization.recipe",
            "quantizes nothing that this model has",
        ),
        (
            dict(recipe="mxfp4_qat", moe=dict(expert_width=48)),
            "moe.expert_width",
            "must be a multiple of 32 for expert_",
        ),
        (dict(activation_scale="per_row"), "quantization.activation_scale", "choose from per_tok"),
        (dict(activation_scale="static"), "quantization.activation_scale", "nothing is calibrated"),
        (
            dict(roles=("expert_down.activation=nvfp4_2d",)),
            "quantization.roles",
            "expert_down.activation=nvfp4_2d shares scales between rows",
        ),
        (
            dict(roles=("embedding.weight=fp8_block",)),
            "quantization.roles",
            "embedding.weight=fp8_block shares scales between rows",
        ),
        (
            dict(recipe="w4a16", roles=("expert_down.gradient=nvfp4",)),
            "quantization.roles",
            "expert_down: with a format for dy, x needs one too",
        ),
        (dict(start_step=200), "quantization.start_step", "less than train.num_steps=200"),
        (dict(start_step=-1), "quantization.start_step", "at least 0"),
        (dict(start_step=5, end_step=5), "quantization.end_step", "more than"),
        (dict(teacher="nowhere"), "quantization.teacher", "must be the directory of a run"),
        (dict(train=dict(start_from="nowhere")), "train.start_from", "the directory of a run"),
        (dict(flip_every=2), "quantization.flip_every", "unless the recipe rounds"),
        (
            dict(recipe="nvfp4_qat", reset_every=10),
            "quantization.reset_window",
            "at most quantization.reset_every=10, got 50",
        ),
        (dict(temperature=0.0), "quantization.temperature", "greater than 0"),
        (dict(teacher_share=1.5), "quantization.teacher_share", "between 0 and 1"),
    ],
)
def test_config_problems(fields, path, message):
    found = problems(**fields)
    assert path in found and message in found[path], found


def test_a_good_config_has_no_problem():
    for name in recipes.NAMED:
        assert problems(recipe=name) == {}


@pytest.mark.parametrize("scale", ["per_group", "per_tensor"])
def test_a_shared_scale_leaks_and_the_model_says_so(scale):
    recipe = recipes.named("w4a4", activation_scale=scale)
    transformer = model.from_config(CONFIG, VOCAB, recipe=recipe)
    assert scale in transformer.leak
    inputs = make_inputs()
    token = np.array(inputs.token_BL)
    token[:, 10:] = (token[:, 10:] + 7) % VOCAB
    later = inputs._replace(token_BL=jnp.asarray(token))
    assert np.abs(output(recipe, inputs)[:, :10] - output(recipe, later)[:, :10]).max() > 1e-4
    # MX formats have no global scale: nothing to share.
    assert (
        model.from_config(
            CONFIG, VOCAB, recipe=recipes.named("w4a4", "mxfp4", activation_scale=scale)
        ).leak
        == ""
    )


@pytest.mark.slow
def test_micro_batches_round_with_noise_of_their_own():
    """Eight equal sequences: noise that repeated itself would add up to itself."""
    transformer = model.from_config(CONFIG, VOCAB, recipe=recipes.named("nvfp4_training"))
    one = make_inputs(batch=1)

    @jax.jit
    def gradient(first):
        inputs = one._replace(key=jnp.array([0, 7], jnp.uint32), row_B=first[None])

        def loss(params):
            out = transformer.apply(variables() | {"params": params}, inputs, train=True)
            return jnp.sum(out.hidden_BLD[..., 0])

        return jax.grad(loss)(variables()["params"])

    a, b = (gradient(jnp.int32(i)) for i in (0, 3))
    for path in (
        ("segment_1", "block_0", "moe", "shared", "down"),
        ("segment_1", "block_0", "moe", "experts", "down"),
        ("segment_0", "block_0", "dense", "down"),
    ):
        x, y = a, b
        for key in path:
            x, y = x[key], y[key]
        assert np.any(x != y), path
