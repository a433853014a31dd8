"""Upcycling: a sparse model that starts as the dense one, plain, granular, and what does not fit."""

import json
import re

import jax
import numpy as np
import pytest
from tiny import VOCAB, make_config, make_inputs

from moelab import config as configs
from moelab import manifest, model, upcycle
from moelab.errors import ConfigError

DENSE = dict(moe=dict(num_experts=0), model=dict(num_layers=3, dense_width=64))


@pytest.fixture(scope="module")
def dense():
    """A dense model, its parameters, and what it computes."""
    built = model.from_config(make_config(**DENSE), VOCAB)
    params = model.init(built, jax.random.key(1))["params"]
    return built, params, hidden(built, params, {})


def hidden(built, params, router_state):
    variables = {"params": params, "router_state": router_state}
    return jax.jit(built.apply)(variables, make_inputs()).hidden_BLD


def save_dense(path, **sections):
    """The saved config of a dense run, and a checkpoint as far as its manifest."""
    saved = configs.record(make_config(**(DENSE | sections)))
    (path / "config.json").write_text(json.dumps(saved))
    folder = path / "checkpoints" / "4" / "manifest"
    folder.mkdir(parents=True, exist_ok=True)
    described, _ = manifest.describe(4, {"w": np.zeros(2, np.float32)})
    (folder / "metadata").write_text(json.dumps(described))


def start(dense, tmp_path, *, router, upcycle_fields=(), **moe):
    """The sparse model's output at its first step; the reference matmul compiles fastest."""
    moe = dict(implementation="reference") | moe
    save_dense(tmp_path)
    fields = dict(run=str(tmp_path)) | dict(upcycle_fields)
    sparse_config = make_config(
        model=dict(num_layers=3, dense_width=64),
        moe=moe,
        router=router,
        upcycle=fields,
    )
    assert upcycle.problems(sparse_config) == []
    sparse = model.from_config(sparse_config, VOCAB)
    variables = model.init(sparse, jax.random.key(2))
    new = upcycle.params(sparse_config, sparse, variables["params"], dense[0], dense[1])
    assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, variables["params"])
    return hidden(sparse, new, variables["router_state"])


@pytest.mark.parametrize(
    "router, moe",
    [
        (dict(k=2), dict(num_experts=4, expert_width=64)),
        pytest.param(
            dict(k=3, score="sigmoid", scale=2.5),
            dict(num_experts=4, expert_width=64),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(k=1, score_before_selection=False, renormalise=False),
            dict(num_experts=4, expert_width=64, num_dense_layers=1, num_shared_experts=1),
            marks=pytest.mark.slow,
        ),
        # Granular: shards of half the width, two virtual groups of two, then one group chosen of four.
        (dict(k=4), dict(num_experts=8, expert_width=32)),
        pytest.param(
            dict(k=2), dict(num_experts=8, expert_width=32, every=2), marks=pytest.mark.slow
        ),
    ],
)
def test_starts_as_the_dense_model(dense, tmp_path, router, moe):
    got = start(dense, tmp_path, router=dict(kind="top_k") | router, **moe)
    np.testing.assert_allclose(got, dense[2], atol=2e-5)


@pytest.mark.slow
def test_without_virtual_groups_granular_experts_miss_shards(dense, tmp_path):
    moe = dict(num_experts=8, expert_width=32)
    fields = dict(virtual_groups=False)
    got = start(dense, tmp_path, router=dict(k=2), upcycle_fields=fields, **moe)
    assert np.abs(got - dense[2]).max() > 1e-2


@pytest.mark.parametrize(
    "router, moe, word",
    [
        (dict(k=1), {}, "renormalise"),
        (dict(kind="remoe"), {}, "remoe"),
        (dict(k=2), dict(capacity_factor=1.0), "capacity_factor"),
        (dict(k=2), dict(activation="gpt_oss"), "activation"),
    ],
)
def test_says_what_cannot_equal_the_dense_model(tmp_path, router, moe, word):
    save_dense(tmp_path)
    sections = dict(model=DENSE["model"], router=router, moe=moe, upcycle=dict(run=str(tmp_path)))
    config = make_config(**sections)
    assert any(word in f"{path} {message}" for path, message in upcycle.problems(config))


def test_a_run_that_is_not_there():
    found = upcycle.problems(make_config(upcycle=dict(run="runs/none")))
    assert found == [("upcycle.run", "must be the directory of a dense run, got 'runs/none'")]


def test_a_run_of_another_model(tmp_path):
    save_dense(tmp_path, model=dict(num_layers=2, width=64))
    config = make_config(model=DENSE["model"], upcycle=dict(run=str(tmp_path)))
    assert {path for path, _ in upcycle.problems(config)} == {"model.num_layers", "model.width"}
    save_dense(tmp_path, moe=dict(num_experts=4))
    assert "has experts" in str(upcycle.problems(config))


def found_by_a_dry_run(tmp_path, **sections):
    """The problems of a config that upcycles the saved run, by path: validation reads no array."""
    sections = {"model": {}} | sections
    sections["model"] = DENSE["model"] | sections["model"]
    return dict(upcycle.problems(make_config(upcycle=dict(run=str(tmp_path)), **sections)))


@pytest.mark.parametrize(
    "sections, path, words",
    [
        (dict(moe=dict(expert_width=48)), "moe.expert_width", "must divide 64"),
        (dict(moe=dict(expert_width=128)), "moe.expert_width", "must divide 64"),
        # 64 / 16 = 4 shards: six experts hold some more often, two chosen ones miss some.
        (dict(moe=dict(expert_width=16, num_experts=6)), "moe.num_experts", "divisible by 4"),
        (dict(moe=dict(expert_width=16, num_experts=4)), "router.k", "divisible by 4"),
        (
            dict(moe=dict(every=2), model=dict(dense_width=48)),
            "model.dense_width",
            "must be 64, as in upcycle.run, for the layers without experts; got 48",
        ),
        (dict(tokenizer=dict(kind="bpe")), "tokenizer.kind", "must be byte, .*; got bpe"),
        (dict(data=dict(kind="tokens")), "data.kind", "must be corpus, .*; got tokens"),
    ],
)
def test_a_dry_run_finds_what_does_not_fit(tmp_path, sections, path, words):
    save_dense(tmp_path)
    assert found_by_a_dry_run(tmp_path) == {}
    assert re.search(words, found_by_a_dry_run(tmp_path, **sections)[path])


def test_a_dry_run_finds_other_tokens_of_one_kind(tmp_path):
    save_dense(tmp_path, tokenizer=dict(kind="bpe"), data=dict(domains=("code", "verse")))
    same = dict(tokenizer=dict(kind="bpe"), data=dict(domains=("verse", "code")))
    assert found_by_a_dry_run(tmp_path, **same) == {}
    small = found_by_a_dry_run(tmp_path, **same | dict(tokenizer=dict(kind="bpe", vocab_size=512)))
    assert list(small) == ["tokenizer.vocab_size"]
    other = found_by_a_dry_run(tmp_path, **same | dict(data=dict(domains=("code",))))
    assert list(other) == ["data.domains"]
    save_dense(tmp_path, data=dict(kind="tokens"))
    assert list(found_by_a_dry_run(tmp_path, data=dict(kind="tokens", end_id=7))) == ["data.end_id"]


def test_a_dry_run_finds_that_a_run_has_no_checkpoint(tmp_path):
    save_dense(tmp_path)
    (tmp_path / "checkpoints" / "4" / "manifest" / "metadata").write_text("{}")
    found = found_by_a_dry_run(tmp_path)
    assert list(found) == ["upcycle.run"] and "no checkpoint" in found["upcycle.run"]


@pytest.mark.parametrize(
    "sparse, word",
    [
        (dict(moe=dict(num_experts=4, expert_width=48)), "must divide the dense width 64"),
        (dict(model=dict(num_layers=2), moe=dict(expert_width=64)), "layers"),
        (dict(model=dict(width=48), moe=dict(expert_width=64)), "does not fit"),
    ],
)
def test_models_that_do_not_fit(dense, sparse, word):
    sections = {"model": dict(num_layers=3)} | sparse
    sections["model"] = dict(num_layers=3) | sections["model"]
    config = make_config(**sections)
    built = model.from_config(config, VOCAB)
    fresh = model.init(built, jax.random.key(0))["params"]
    with pytest.raises(ConfigError, match=word):
        upcycle.params(config, built, fresh, dense[0], dense[1])
