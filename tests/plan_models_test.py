"""Shapes of models: parameters, bytes and FLOPs against what their makers publish and against moelab's own counts."""

import json

import pytest

from moelab import config as configs
from moelab import launch
from moelab.errors import UserError
from moelab.plan import models, published, readers, recipes
from moelab.plan.figures import Source

BF16 = recipes.named("bf16")


@pytest.mark.parametrize("name", [n for n, m in published.MODELS.items() if m.published_total])
def test_totals_are_the_published_ones(name):
    model = published.MODELS[name]
    assert abs(model.total() / model.published_total - 1) < 0.005
    assert model.published.date and model.published.text


def test_totals_of_checkpoints_are_exact():
    exact = {n: m for n, m in published.MODELS.items() if m.published_total % 10**6}
    assert len(exact) == 7
    assert all(m.total() == m.published_total for m in exact.values())


@pytest.mark.parametrize(
    ("name", "billions"),
    # Mixtral 12.9 (arXiv:2401.04088), OLMoE 1.3 (arXiv:2409.02060), Qwen3 3.35 and 22.19 as counted by many; DeepSeek
    # 37 and Kimi 32.9 with their embedding; gpt-oss 5.13 and 3.61 without, 0.579 B (model card, table 1).
    [
        ("mixtral_8x7b", 12.88),
        ("olmoe", 1.282),
        ("qwen3_30b", 3.353),
        ("qwen3_235b", 22.19),
        ("deepseek_v3", 37.55),
        ("kimi_k2", 32.86),
        ("gpt_oss_120b", 5.13 + 0.579),
        ("gpt_oss_20b", 3.61 + 0.579),
    ],
)
def test_active_parameters(name, billions):
    assert published.find(name).active() / 1e9 == pytest.approx(billions, rel=0.005)


def test_mixtral_by_hand():
    model = published.find("mixtral_8x7b")
    # 32 layers x 8 experts x 3 matrices of 4096 x 14336; attention 4096 x (32 + 8 + 8 + 32) x 128
    assert model.parameters()["experts"] == 32 * 8 * 3 * 4096 * 14336
    assert model.parameters()["attention"] == 32 * 4096 * (32 + 8 + 8 + 32) * 128
    # 32 layers x keys and values of 8 heads of 128, two bytes each = 128 KiB
    assert model.kv_bytes_per_token(BF16) == 32 * 2 * 8 * 128 * 2


def test_key_value_bytes():
    kib = lambda name: published.find(name).kv_bytes_per_token(BF16) / 1024  # noqa: E731
    assert [kib(n) for n in ("qwen3_235b", "deepseek_v3", "gpt_oss_120b")] == [188, 68.625, 72]
    # gpt-oss: 18 layers keep all 8192 tokens, 18 keep 128; an element is 2 bytes, 1024 of them a layer and token
    assert published.find("gpt_oss_120b").kv_bytes(BF16, 8192) == 18 * (8192 + 128) * 1024 * 2
    assert published.find("deepseek_v3").kv_bytes(recipes.named("fp8+kv8"), 10) == 61 * 576 * 10


@pytest.mark.parametrize(
    ("name", "recipe", "gigabytes"),
    # The official gpt-oss checkpoints are 60.8 and 12.8 GiB (model card, table 1); R1's NVFP4 is about 400 GB.
    [
        ("gpt_oss_120b", "mxfp4", 60.8 * 1.0737),
        ("gpt_oss_20b", "mxfp4", 12.8 * 1.0737),
        ("deepseek_v3", "nvfp4", 402),
        ("deepseek_v3", "bf16", 1342),
    ],
)
def test_weight_bytes(name, recipe, gigabytes):
    found = published.find(name).weight_bytes(recipes.named(recipe)) / 1e9
    assert found == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize(
    ("name", "core", "published_gflop"),
    # TFLOP/s over tokens/s of Megatron-Bridge 25.11's table. Its counts take half of the keys (causal) at 4096 tokens;
    # the row of gpt-oss is the weights alone, however it came about: with the core at 4096 it would be 32.7.
    [
        ("deepseek_v3", "causal", 249.6),
        ("qwen3_235b", "causal", 147.9),
        ("qwen3_30b", "causal", 23.0),
        ("gpt_oss_120b", "none", 30.8),
    ],
)
def test_training_flops(name, core, published_gflop):
    found = published.find(name).training_flops(4096, core) / 1e9
    assert found == pytest.approx(published_gflop, rel=0.02)


@pytest.mark.parametrize("name", ["demo", "ablation", "tiny", "serving/packed", "routing/olmoe"])
def test_moelab_configs_have_their_own_counts(name):
    config = configs.load(name).config
    own, model = launch.summary(config), readers.model(name)
    assert model.total() == own["parameters"]["total"]
    assert model.active() == own["parameters"]["active"]
    # summary counts two FLOPs for a norm's scale as for a matrix's weight
    forward, norms = own["flops_per_token"]["forward"], 2 * model.parameters()["rest"]
    assert model.forward_flops(config.train.length) + norms == forward


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_layers=6", "moe.every=2", "moe.num_dense_layers=1"],
        ["moe.num_experts=0"],
        ["moe.num_shared_experts=2", "model.tied_head=False", "model.num_kv_heads=1"],
    ],
)
def test_fields_of_moelab_configs_change_both_counts(overrides):
    config = configs.load("tiny", overrides).config
    own = launch.summary(config)["parameters"]
    model = readers.of_config(config, configs.vocab_size(config), "x")
    assert (model.total(), model.active()) == (own["total"], own["active"])


def test_xla_counts_the_same_flops():
    """The compiled forward pass of one block with one expert: the reference computes every expert for every token."""
    import jax
    import jax.numpy as jnp

    from moelab import model as model_lib
    from moelab import parallel

    overrides = ["model.num_layers=1", "model.width=256", "model.head_dim=64", "train.length=64"]
    overrides += [
        "moe.num_experts=1",
        "router.k=1",
        "moe.expert_width=512",
        "moe.implementation=reference",
    ]
    config = configs.load("tiny", overrides).config
    vocab = configs.vocab_size(config)
    network = model_lib.from_config(config, vocab, parallel.make_mesh(1))
    tokens = jnp.zeros((2, 64), jnp.int32)
    inputs = model_lib.Inputs(token_BL=tokens, mask_BL=jnp.ones((2, 64), bool))
    variables = jax.eval_shape(lambda: model_lib.init(network, jax.random.key(0)))
    compiled = jax.jit(network.apply).lower(variables, inputs).compile()
    shape = readers.of_config(config, vocab, "tiny")
    head = 2 * shape.vocab * shape.width  # the network returns hidden vectors
    wanted = 128 * (shape.forward_flops(64) - head)
    assert compiled.cost_analysis()["flops"] == pytest.approx(wanted, rel=0.03)


def hugging_face(**changed):
    fields = {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "vocab_size": 151936,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    return {k: v for k, v in (fields | changed).items() if v is not None}


def test_a_hugging_face_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hugging_face()))
    assert readers.model(str(path)).total() == published.find("qwen3_30b").total()
    assert readers.model(str(tmp_path)).total() == published.find("qwen3_30b").total()


def test_nested_text_configs_are_read():
    nested = {"model_type": "some_vision_model", "text_config": hugging_face()}
    assert readers.from_hugging_face(nested, "x").total() == published.find("qwen3_30b").total()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (hugging_face(model_type="mamba"), "'mamba' is not known here; there are"),
        (hugging_face(num_experts_per_tok=None), "wants the field 'num_experts_per_tok'"),
        (hugging_face(vocab_size=None), "wants the field 'vocab_size'"),
        (hugging_face() | {"vocab_size": None}, "vocab wants a whole number from 0, got None"),
        (hugging_face(hidden_size=-1), "width wants a whole number from 0, got -1"),
        (hugging_face(hidden_size=2048.5), "width wants a whole number from 0, got 2048.5"),
        (hugging_face(num_hidden_layers=0), "layers wants a number above 0"),
        (hugging_face(num_experts="many"), "experts wants a whole number from 0, got 'many'"),
        (hugging_face(num_experts_per_tok=200), "wants 1 to 128 experts, got 200"),
        (hugging_face(num_experts_per_tok=0), "wants 1 to 128 experts, got 0"),
        (hugging_face(num_key_value_heads=5), "32 heads cannot share 5"),
        (hugging_face(mlp_only_layers=list(range(50))), "more layers of one kind than the 48"),
        (hugging_face(n_group=3, topk_group=1), "128 experts cannot be in 3 groups"),
    ],
)
def test_wrong_hugging_face_configs(fields, message):
    with pytest.raises(published.ModelError, match=message):
        readers.from_hugging_face(fields, "x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepsek_v3", "did you mean deepseek_v3"),
        ("gpt5", "there are mixtral_8x7b"),
        ("missing/config.json", "config.json cannot be read: No such file"),
        ("routing/soft_moe", "Soft MoE"),
    ],
)
def test_wrong_models(name, message):
    with pytest.raises(UserError, match=message):
        readers.model(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nvfp", "did you mean nvfp4"), ("fp8+kv4", "comes kv8"), ("x", "there are")],
)
def test_wrong_precisions(name, message):
    with pytest.raises(recipes.RecipeError, match=message):
        recipes.named(name)


def test_windows_and_recurrent_states():
    attention = models.Attention(
        heads=2,
        kv_heads=1,
        head_dim=8,
        window=4,
        windowed=1,
        linear=1,
        linear_key_heads=1,
        linear_value_heads=2,
        linear_dim=8,
    )
    model = models.Model(
        name="x",
        layers=3,
        width=16,
        vocab=10,
        attention=attention,
        dense_layers=3,
        dense_width=8,
        source=Source("a test", "2026-11"),
    )
    # one layer keeps 100 tokens, one 4, of 16 elements of 2 bytes; a state of 2 heads x 8 x 8 floats
    assert model.kv_bytes(BF16, 100) == (100 + 4) * 16 * 2 + 2 * 8 * 8 * 4
    # 104 keys x 4 x 2 heads x 8, and 8 FLOPs for each of the state's numbers
    assert model.core_flops(100) == 104 * 4 * 2 * 8 + 8 * 2 * 64
