"""Coefficients in other systems' conventions, against each system's loss written out by hand."""

import numpy as np
import pytest

from moelab.report import conventions


def by_system(*arguments, **options):
    return {row.system.split()[0]: row for row in conventions.equivalent(*arguments, **options)}


def test_by_hand():
    # a = 0.08, k = 8, M = 16 layers, no accumulation
    rows = by_system(0.08, 8, 64, 16)
    assert rows["Megatron-Core"].value == pytest.approx(0.005)  # 0.08 / 16
    assert rows["MegaBlocks"].value == rows["OLMo-core"].value == 0.08
    assert rows["MaxText"].value == pytest.approx(0.01)  # 0.08 / 8
    assert rows["Hugging"].value == pytest.approx(0.01)
    assert [rows[name].at_balance for name in ("Megatron-Core", "MegaBlocks", "MaxText")] == [
        16,
        1,
        8,
    ]


def test_accumulation_by_hand():
    rows = by_system(0.08, 8, 64, 16, accumulation_steps=4)
    assert rows["Megatron-Core"].value == pytest.approx(0.005)
    assert rows["Hugging"].value == pytest.approx(0.0025)  # 0.08 / (8 * 4)
    assert rows["MaxText"].value is None and "tokens per step" in rows["MaxText"].formula


def _losses(count_ME, prob_ME, k, tokens):
    """Each system's unweighted term, as its code has it, for layers of T tokens in one sequence."""
    layers, experts = count_ME.shape
    per_layer_M = experts * (count_ME * prob_ME).sum(1) / tokens  # not divided by k
    every_E = count_ME.mean(0) / tokens * prob_ME.mean(0)
    return {
        "ours": per_layer_M.mean() / k,
        "Megatron-Core": (per_layer_M / k).sum(),
        "MegaBlocks": (per_layer_M / k).sum() / layers,
        "OLMo-core": (per_layer_M / k / layers).sum(),
        "MaxText": (experts**2 * (count_ME / tokens * prob_ME).mean(1)).mean(),
        "Hugging": experts * every_E.sum(),
    }


def test_the_weighted_terms_agree_where_layers_route_alike_and_hugging_face_differs_where_not():
    rng, k, tokens, experts, layers = np.random.default_rng(0), 2, 32, 4, 3
    rows = by_system(0.03, k, experts, layers)
    prob_ME = rng.dirichlet(np.ones(experts), layers)
    chosen = [np.argsort(rng.random((tokens, experts)), axis=1)[:, :k] for _ in range(layers)]
    count_ME = np.stack([np.bincount(c.ravel(), minlength=experts) for c in chosen]).astype(float)
    alike = _losses(count_ME[:1].repeat(layers, 0), prob_ME[:1].repeat(layers, 0), k, tokens)
    for name, row in rows.items():
        assert row.value * alike[name] == pytest.approx(0.03 * alike["ours"], rel=1e-12), name
    found = _losses(count_ME, prob_ME, k, tokens)
    for name, row in rows.items():
        same = row.value * found[name] == pytest.approx(0.03 * found["ours"], rel=1e-6)
        assert same == (name != "Hugging"), name
    even = _losses(
        np.full((layers, experts), tokens * k / experts),
        np.full((layers, experts), 1 / experts),
        k,
        tokens,
    )
    assert {n: row.at_balance for n, row in rows.items()} == pytest.approx(
        {n: even[n] for n in rows}
    )


@pytest.mark.parametrize("bad", [(-1, 1, 2, 1), (0.1, 3, 2, 1), (0.1, 0, 2, 1), (0.1, 1, 2, 0)])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="wants coefficient >= 0"):
        conventions.equivalent(*bad)


def test_of_a_config():
    config = {
        "balance": {"switch_loss": {"coefficient": 0.02, "first_choice_only": False}},
        "router": {"kind": "top_k", "k": 2},
        "moe": {"num_experts": 8},
        "train": {"accumulation_steps": 2},
    }
    assert conventions.of_config(config, 4) == conventions.equivalent(0.02, 2, 8, 4, 2)
    assert conventions.of_config(config, 0) is None
    assert (
        conventions.of_config(config | {"router": {"k": 9}}, 4) is None
    )  # a card may say anything
    config["balance"]["switch_loss"]["first_choice_only"] = True
    assert conventions.of_config(config, 4) is None
    assert conventions.of_config({"seed": 0}, 4) is None
