"""Recipes name formats that exist; packing takes the experts, all of them and nothing else."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelab import quant, schema
from moelab.quant import recipes
from pallas_kernels import formats

PACKED = [name for name in recipes.NAMES if recipes.get(name).packed]
# Two layers, E=3 experts, D=32, F=64.
SHAPES = {"gate_up": (2, 3, 128, 32), "down": (2, 3, 32, 64)}


def make_params():
    key = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda shape: jax.random.normal(next(key), shape)  # noqa: E731
    return {
        "embedding": draw((8, 32)),
        "segment_0": {
            "moe": {
                "experts": {name: draw(shape) for name, shape in SHAPES.items()},
                "router": {"kernel": draw((2, 32, 3))},
                "shared": {"gate_up": draw((2, 128, 32)), "down": draw((2, 32, 64))},
            },
            "norm": {},
        },
    }


@pytest.mark.parametrize("name", recipes.NAMES)
def test_recipes_are_named_after_what_they_do(name):
    recipe = recipes.get(name)
    assert recipe.name == name and recipe.label
    assert recipe.activation_scale == "per_token"  # anything else lets tokens see the future
    assert recipe.packed == (recipe.expert_weight in formats.FORMATS)
    assert (recipe.expert_activation in formats.FORMATS) == name.endswith("_wa")
    assert (recipe.kv_cache.activation in formats.FORMATS) == name.endswith("_kv")
    assert recipe.compute_dtype == ("bfloat16" if name == "bf16" else "float32")


def test_default_precisions_are_recipes_and_float32_comes_first():
    defaults = schema.Evaluation().precisions
    assert set(defaults) <= set(recipes.NAMES) and defaults[0] == "float32"


def test_a_misspelt_recipe_gets_the_nearest_name():
    with pytest.raises(ValueError, match="unknown recipe 'nvfp4_x'; did you mean 'nvfp4_w"):
        recipes.get("nvfp4_x")
    with pytest.raises(ValueError, match="choose from float32, bf16, fp8_w"):
        recipes.get("zzz")


def test_recipes_need_no_jax():
    code = "import sys, moelab.quant.recipes; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", PACKED)
def test_pack_takes_the_experts_and_only_them(name):
    params, recipe = make_params(), recipes.get(name)
    before = jax.tree.map(np.array, params)
    rest, quantized = quant.pack(params, recipe)
    jax.tree.map(np.testing.assert_array_equal, params, before)  # the argument is not changed

    moe = params["segment_0"]["moe"]
    assert rest["segment_0"].keys() == {"moe", "norm"} and rest["segment_0"]["norm"] == {}
    assert rest["segment_0"]["moe"].keys() == {"router", "shared"}
    assert rest["segment_0"]["moe"]["shared"].keys() == {"gate_up", "down"}
    assert rest["embedding"] is params["embedding"]
    assert quantized.keys() == {"segment_0"} and quantized["segment_0"].keys() == {"moe"}
    assert quantized["segment_0"]["moe"].keys() == {"experts"}
    for matrix, value in quantized["segment_0"]["moe"]["experts"].items():
        assert value.shape == SHAPES[matrix] and value.format == recipe.expert_weight
        # Each expert's matrix is what it would be alone: scales are shared with no other expert or layer.
        alone = formats.quantize(
            moe["experts"][matrix][1, 2], recipe.expert_weight, rule=recipe.weight_rule
        )
        for got, wanted in zip(
            jax.tree.leaves(jax.tree.map(lambda x: x[1, 2], value)),
            jax.tree.leaves(alone),
            strict=True,
        ):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_plain_recipes_pack_nothing(name):
    params = make_params()
    rest, quantized = quant.pack(params, recipes.get(name))
    assert quantized == {} and jax.tree.structure(rest) == jax.tree.structure(params)


# 2 layers x 3 experts x (128*32 + 32*64) = 36864 weights in 2*3*(128 + 32) = 960 output rows and 12 matrices.
@pytest.mark.parametrize(
    "name, wanted",
    [
        ("float32", 4 * 36864),
        ("bf16", 2 * 36864),
        ("fp8_w", 36864 + 4 * 960),  # a byte a weight, a float32 a row
        ("mxfp8_w", 36864 + 36864 // 32),  # a byte a weight, a byte per 32
        ("mxfp4_w", 36864 // 2 + 36864 // 32),
        ("nvfp4_w", 36864 // 2 + 36864 // 16 + 4 * 12),  # and a float32 a matrix
        ("nvfp4_wa", 36864 // 2 + 36864 // 16 + 4 * 12),  # activations are not stored
    ],
)
def test_expert_bytes(name, wanted):
    params, recipe = make_params(), recipes.get(name)
    trees = quant.pack(params, recipe)
    assert sum(quant.expert_bytes(tree, recipe) for tree in trees) == wanted
    shapes = jax.eval_shape(lambda: trees)
    assert sum(quant.expert_bytes(tree, recipe) for tree in shapes) == wanted


def test_what_does_not_fit_is_named():
    recipe = recipes.get("nvfp4_w")
    odd = {"block": {"experts": {"down": jnp.ones((2, 4, 24))}}}
    with pytest.raises(ValueError, match="block/experts/down cannot be packed as nvfp4_w.*of 16"):
        quant.pack(odd, recipe)
    flat = {"experts": {"gate_up": jnp.ones((4, 32))}}
    with pytest.raises(ValueError, match=r"experts/gate_up has shape \(4, 32\)"):
        quant.pack(flat, recipe)


@pytest.mark.parametrize("name", ["nvfp4_w", "fp8_w"])
def test_unpack_puts_the_dequantized_weights_back(name):
    params = make_params()
    rest, quantized = quant.pack(params, recipes.get(name))
    merged = quant.unpack(rest, quantized)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    packed = jax.tree.leaves(quantized, is_leaf=lambda x: isinstance(x, formats.BlockScaled))
    wanted = {formats.dequantize(q).tobytes() for q in packed}
    got = {leaf.tobytes() for leaf in jax.tree.leaves(merged)}
    assert wanted <= got
    changed = [
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    ]
    assert sum(c > 0 for c in changed) == len(packed)


def test_one_matrix_may_stay_plain_and_a_block_may_be_kept():
    params = make_params()
    recipe = recipes.named("w4a16", roles=("expert_down.weight=none",))
    rest, quantized = quant.pack(params, recipe)
    assert quantized["segment_0"]["moe"]["experts"].keys() == {"gate_up"}
    assert rest["segment_0"]["moe"]["experts"].keys() == {"down"}
    merged = quant.unpack(rest, quantized)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    keep = frozenset({("segment_0", "moe")})
    assert quant.pack(params, recipe, keep) == (params, {})


@pytest.mark.parametrize("name", recipes.NAMED)
def test_named_recipes_name_formats_that_exist(name):
    recipe = recipes.named(name)
    assert recipe.name == name and recipe.quantizes == (name != "none")
    for role, parts in recipes.ROLES.items():
        for part in ("weight", "activation", "gradient"):
            value = getattr(getattr(recipe, role), part)
            assert value is None or (part in parts and value in formats.FORMATS)
    assert recipe.activation_scale == "per_token"


def test_what_the_recipes_say():
    nvidia = recipes.named("nvfp4_training")
    assert nvidia.expert_down == recipes.Formats(
        weight="nvfp4_2d", activation="nvfp4", gradient="nvfp4"
    )
    assert (nvidia.hadamard, nvidia.rounding) == (16, "stochastic")
    assert nvidia.attention == nvidia.head == nvidia.router == recipes.PLAIN
    assert recipes.named("nvfp4_qat").expert_down.gradient is None  # straight-through
    assert recipes.named("w4a16", "mxfp4").expert_gate_up == recipes.Formats(weight="mxfp4")
    assert recipes.named("w4a8", "mxfp4").expert_gate_up.activation == "mxfp8_e4m3"
    assert recipes.named("w4a4", "nvfp4_2d").expert_gate_up.activation == "nvfp4"
    assert set(recipes.FOUR_BIT) <= set(formats.FORMATS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nvfp4_qta",), "unknown recipe 'nvfp4_qta'; did you mean 'nvfp4_qat'"),
        (("w4a4", "fp8_block"), "unknown 4-bit format 'fp8_block'; choose from nvfp4"),
        (
            ("none", "nvfp4", ("atention.weight=nvfp4",)),
            "role 'atention'; did you mean 'attention'",
        ),
        (
            ("none", "nvfp4", ("router.gradient=nvfp4",)),
            "router has no 'gradient'; it has weight, a",
        ),
        (("none", "nvfp4", ("router=nvfp4",)), "is not of the form ROLE.PART=FORMAT"),
    ],
)
def test_errors_of_named_recipes(arguments, message):
    with pytest.raises(ValueError, match=message):
        recipes.named(*arguments)


def test_weight_only_rotated_experts_are_the_plain_product_rotated_back():
    weight = jax.random.normal(jax.random.key(3), (1, 2, 32, 64))
    params = {"s": {"moe": {"experts": {"gate_up": weight, "down": weight}}}}
    recipe = recipes.Recipe(
        name="r", label="r", rotation=32, **recipes.experts(recipes.Formats(weight="mxfp4"))
    )
    rest, quantized = quant.pack(params, recipe)
    merged = quant.unpack(rest, quantized, recipe.rotation)
    rotated = formats.block_hadamard(weight, 32)
    want = formats.dequantize(formats.quantize(rotated, "mxfp4"))
    got = formats.block_hadamard(merged["s"]["moe"]["experts"]["down"], 32)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert recipe.without_experts_weights().rotation is None
