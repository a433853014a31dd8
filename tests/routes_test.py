"""Routes of a trained run: recorded, replayed, compared and placed, from Python and from the command line."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import moelab
from moelab import cli, diagnostics, environment, evaluate, routes, trace
from moelab import config as configs
from moelab.report import routes as reported

CONFIG = dict(
    seed=3,
    model=dict(num_layers=3, width=32, num_heads=2, num_kv_heads=1, head_dim=16, dense_width=64),
    moe=dict(num_experts=8, expert_width=32, num_dense_layers=1),
    train=dict(num_steps=4, batch_size=2, length=16),
    schedule=dict(warmup_steps=1),
    tokenizer=dict(kind="byte"),
    evaluation=dict(every=4, tokens_per_domain=300, batch_size=4, precisions=("float32",)),
    checkpoint=dict(every=2),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
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
def run(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    result = moelab.run(CONFIG | {"data": dict(kind="text", path=str(folder))}, workdir)
    assert result.exit_code == 0
    return workdir


@pytest.fixture(scope="module")
def recorded(run):
    return routes.record(run, weights=True)


@pytest.fixture
def moelab_main(capsys, monkeypatch):
    """Runs the command line in this process; returns its exit code and what it printed."""
    monkeypatch.setattr(environment, "prepare", lambda: None)

    def call(*argv):
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, line=err.strip())

    return call


class TestRecord:
    def test_lists_the_evaluated_tokens(self, run, recorded):
        loaded = evaluate.load_run(run)
        batches = evaluate.batches_of(loaded.config, loaded.dataset, "test")
        tokens = np.concatenate([batch.token_BL[batch.mask_BL] for batch in batches])
        assert not all(batch.mask_BL.all() for batch in batches)  # there is padding to leave out
        np.testing.assert_array_equal(recorded.token_id_T, tokens)
        assert recorded.expert_MTK.shape == (2, len(tokens), 2)
        assert recorded.layers == (1, 2) and recorded.domains == ("north", "south")
        assert (recorded.num_experts, recorded.num_columns) == (8, 8)
        domain_N = loaded.dataset.split("test").domain_N
        np.testing.assert_array_equal(recorded.domain_T, domain_N[recorded.document_T])

    def test_every_slot_has_an_expert_and_renormalised_weights_sum_to_1(self, recorded):
        assert recorded.expert_MTK.max() < 8
        assert (recorded.expert_MTK[..., 0] != recorded.expert_MTK[..., 1]).all()
        np.testing.assert_allclose(
            recorded.weight_MTK.astype(float).sum(2), 1, atol=2e-3
        )  # float16

    def test_has_the_load_that_evaluation_counts(self, run, recorded):
        card = json.loads((run / "result.json").read_text())
        share_MGE = np.array(card["evaluation"]["load_by_domain"])
        count_MGE = diagnostics.load_by_domain(recorded)
        np.testing.assert_allclose(
            count_MGE / count_MGE.sum(2, keepdims=True), share_MGE, atol=1e-12
        )

    def test_says_where_it_comes_from(self, run, recorded):
        card = json.loads((run / "result.json").read_text())
        header = recorded.header
        wanted = {"step": 4, "precision": "float32", "split": "test", "slots": 2, "router": "top_k"}
        assert wanted.items() <= header.items()
        assert header["config_sha256"] == card["config_sha256"]
        assert header["dataset_sha256"] == card["data"]["sha256"]
        assert header["dropped_share"] == [0, 0] and min(header["logit_norm"]) > 0
        assert header["columns"] == "computed" and header["leak"] == ""


class TestReplay:
    def test_of_its_own_routes_changes_nothing(self, run, recorded):
        found = routes.replay(run, recorded)
        free, forced = found["rows"]
        card = json.loads((run / "result.json").read_text())
        assert free["loss"] == pytest.approx(card["evaluation"]["rows"][0]["loss"], abs=1e-6)
        assert forced["loss"] == pytest.approx(free["loss"], abs=1e-5)
        assert [row["replayed"] for row in found["rows"]] == [False, True]
        for row in found["rows"]:
            assert row["flip_rate"] == [0, 0] and row["token_flip_rate"] == 0

    @pytest.mark.slow
    def test_in_low_precision_removes_the_flips(self, run, recorded):
        found = routes.replay(run, recorded, precision="nvfp4_wa")
        free, forced = found["rows"]
        live = routes.record(run, precision="nvfp4_wa")
        flips = diagnostics.flip_rate(recorded, live)
        assert free["flip_rate"] == flips.layer_M.tolist() and flips.token > 0
        # The first router comes before any quantized product: it cannot flip.
        assert flips.layer_M[0] == 0 and free["token_flip_rate"] == flips.token
        assert forced["flip_rate"] == [0, 0] and forced["token_flip_rate"] == 0
        assert forced["loss"] != free["loss"]
        assert forced["loss_delta"] == pytest.approx(forced["loss"] - free["loss"], abs=1e-12)

    def test_of_an_earlier_checkpoint_follows_it(self, run):
        early = routes.record(run, step=2)
        free, forced = routes.replay(run, early)["rows"]
        assert free["token_flip_rate"] > 0 and forced["token_flip_rate"] == 0

    def test_refuses_what_does_not_fit(self, run, recorded):
        tokens = len(recorded.token_id_T)
        half = trace.select(recorded, documents=np.unique(recorded.document_T)[:1].tolist())
        with pytest.raises(routes.RoutesError, match=f"differ in tokens: .* and {tokens}"):
            routes.replay(run, half)
        other = recorded.token_id_T.copy()
        other[5] += 1
        with pytest.raises(routes.RoutesError, match="token ids of 1 of .* differ, first at 5"):
            routes.replay(run, _changed(recorded, token_id_T=other))
        with pytest.raises(routes.RoutesError, match="differ in experts: 9 and 8"):
            routes.replay(run, _changed(recorded, num_experts=9, num_columns=9))
        with pytest.raises(routes.RoutesError, match=r"blocks: \(0, 1\) and \[1, 2\]"):
            routes.replay(run, _changed(recorded, layers=(0, 1)))
        one = _changed(recorded, expert_MTK=recorded.expert_MTK[..., :1], weight_MTK=None)
        with pytest.raises(routes.RoutesError, match="slots per token: 1 and 2"):
            routes.replay(run, one)
        with pytest.raises(routes.RoutesError, match="split 'nowhere'"):
            routes.replay(run, _changed(recorded, header={"split": "nowhere"}))


def _changed(given, **fields):
    names = ("expert_MTK", "token_id_T", "domain_T", "document_T", "layers", "domains")
    names += ("num_experts", "num_columns", "weight_MTK", "header")
    return trace.Trace(**{name: getattr(given, name) for name in names} | fields)


def _with_config(run, directory, **sections):
    """A copy of a run that reads the same parameters under another config."""
    saved = json.loads((run / "config.json").read_text())
    for name, values in sections.items():
        saved["config"][name] = saved["config"][name] | values
    shutil.copytree(run, directory)
    (directory / "config.json").write_text(json.dumps(saved))
    return directory


@pytest.mark.slow
def test_under_a_capacity_the_choice_before_it_replays_exactly(run, tmp_path):
    run = _with_config(run, tmp_path / "run", moe=dict(capacity_factor=0.8))
    chosen = routes.record(run, before_capacity=True)
    computed = routes.record(run)
    dropped_M = (computed.expert_MTK == 8).mean((1, 2))
    assert (dropped_M > 0.1).all() and (chosen.expert_MTK < 8).all()
    np.testing.assert_allclose(computed.header["dropped_share"], dropped_M, rtol=1e-6)
    kept = computed.expert_MTK < 8
    np.testing.assert_array_equal(computed.expert_MTK[kept], chosen.expert_MTK[kept])
    free, forced = routes.replay(run, chosen)["rows"]
    assert forced["loss"] == pytest.approx(free["loss"], abs=1e-5)
    assert forced["token_flip_rate"] == 0
    # Renormalised over the slots that are left, the weights are others: the routes are the same, the loss is not.
    free, forced = routes.replay(run, computed)["rows"]
    assert forced["token_flip_rate"] == 0 and abs(forced["loss_delta"]) > 1e-6


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            dict(router=dict(kind="expert_choice")),
            "router.kind=expert_choice experts choose tokens",
        ),
        (dict(moe=dict(num_experts=0)), "has no MoE layers"),
        (dict(moe=dict(num_experts=4, slots_per_expert=2)), "is Soft MoE"),
    ],
)
def test_runs_without_token_choice_have_no_routes(tmp_path, sections, message):
    saved = configs.record(configs.from_dict(sections))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(routes.RoutesError, match=message):
        routes.record(tmp_path)


@pytest.fixture(scope="module")
def files(run):
    """The run's own routes, of two checkpoints and in another precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "prepare", lambda: None)
        for words in ((), ("--step", "2"), ("--precision", "nvfp4_wa")):
            assert cli.main(["routes", "record", str(run), *words]) == 0
    return [run / name for name in ("routes.npz", "routes_2.npz", "routes_nvfp4_wa.npz")]


class TestCommands:
    def test_record_writes_into_the_run_or_where_told(self, moelab_main, run, recorded, tmp_path):
        out = tmp_path / "other.npz"
        done = moelab_main("routes", "record", run, "--weights", f"--out={out}", "--json")
        told = json.loads(done.out)
        assert done.code == 0 and told["trace"] == str(out) and told["step"] == 4
        found = trace.load(out)
        np.testing.assert_array_equal(found.expert_MTK, recorded.expert_MTK)
        np.testing.assert_array_equal(found.weight_MTK, recorded.weight_MTK)

    def test_replay(self, moelab_main, run, files):
        done = moelab_main("routes", "replay", run, files[0], "--precision=nvfp4_wa")
        lines = done.out.splitlines()
        assert done.code == 0 and lines[1].startswith("its own") and lines[2].endswith("0.00 %")
        told = json.loads(moelab_main("routes", "replay", run, files[0], "--json").out)
        assert [row["replayed"] for row in told["rows"]] == [False, True]

    def test_diff(self, moelab_main, files):
        told = json.loads(moelab_main("routes", "diff", files[1], files[0], "--json").out)
        flips = diagnostics.flip_rate(trace.load(files[1]), trace.load(files[0]))
        assert [row["flip_rate"] for row in told["rows"]] == flips.layer_M.tolist()
        assert told["a"]["step"] == 2 and told["b"]["step"] == 4
        done = moelab_main("routes", "diff", files[0], files[0])
        assert done.out.splitlines()[1].split()[:6] == [
            "block",
            "1",
            "0.00",
            "%",
            "1.0000",
            "1.0000",
        ]

    def test_show(self, moelab_main, files):
        told = json.loads(moelab_main("routes", "show", files[0], "--json").out)
        assert [row["layer"] for row in told["rows"]] == [1, 2]
        assert sum(told["rows"][0]["load"]) == pytest.approx(1)
        done = moelab_main("routes", "show", files[0])
        assert done.code == 0 and "MaxVio" in done.out and "expert 7" in done.out
        assert "step 4, float32, top_k, test split" in done.err

    def test_place(self, moelab_main, files):
        words = ("routes", "place", files[0], "--devices=4")
        told = json.loads(moelab_main(*words, "--redundant=4", "--json").out)
        assert np.array(told["experts"]).shape == (2, 4, 3)  # (8 + 4) / 4 slots per device
        assert all(row["after_fit"] <= row["before_fit"] for row in told["rows"])
        done = moelab_main(*words, "--nodes=2", "--groups=4")
        assert done.code == 0 and done.out.splitlines()[-1].startswith("mean")

    def test_errors_are_one_line(self, moelab_main, run, files, tmp_path):
        for words, meant in (
            (
                ("record", run, "--precision=nvfp4_v"),
                "did you mean --precision=nvfp4_kv or --precision=nvfp4_w",
            ),
            (("record", run, "--step=3"), "no step 3"),
            (("record", run, "--out=x.txt"), "--out: wants FILE.npz"),
            (("show", run / "result.json"), "not an .npz file"),
            (("place", files[0], "--devices=3"), "the nearest redundant that does: 1"),
            (("place", files[0], "--devices=4", "--nodes=2"), "nodes and groups come together"),
        ):
            done = moelab_main("routes", *words)
            assert (done.code, done.out, done.line.count("\n")) == (2, "", 0), done.line
            assert done.line.startswith("moelab: ") and meant in done.line


def _made(expert_MTK, document_T, domain_T, **fields):
    given = dict(layers=range(len(expert_MTK)), domains=("a", "b"), num_experts=4, num_columns=4)
    expert_MTK = np.asarray(expert_MTK)
    token_id_T = np.arange(expert_MTK.shape[1])
    arrays = dict(expert_MTK=expert_MTK, token_id_T=token_id_T)
    return trace.Trace(**arrays, document_T=document_T, domain_T=domain_T, **given | fields)


def test_interleaving_mixes_domains_and_keeps_documents_whole():
    # Domain a: documents 5, 3; domain b: documents 9, 7, 8, 6. Halves of both come first.
    document_T = np.array([5, 5, 3, 9, 9, 7, 8, 6])
    domain_T = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    given = _made([[[0]] * 8], document_T, domain_T)
    mixed = trace.interleave(given)
    # a: 1/4, 3/4; b: 1/8, 3/8, 5/8, 7/8
    assert mixed.document_T.tolist() == [9, 9, 5, 5, 7, 8, 3, 6]
    assert mixed.token_id_T.tolist() == [3, 4, 0, 1, 5, 6, 2, 7]
    np.testing.assert_array_equal(domain_T[mixed.token_id_T], mixed.domain_T)


def test_the_oracle_knows_the_domain():
    # 3 tokens of a, 1 of b, one slot each: H = -(3/4 ln 3/4 + 1/4 ln 1/4) = 0.562335
    given = _made([[[0], [1], [2], [3]]], np.arange(4), np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(diagnostics.oracle_information(given), [0.562335], atol=1e-6)
    one = _made([[[0]] * 4], np.arange(4), np.array([0, 0, 0, 1]), num_experts=1, num_columns=1)
    np.testing.assert_allclose(diagnostics.oracle_information(one), [0])


def test_a_summary_by_hand():
    # Tokens choose {0, 1}, {0, 1}, {2, 3}, {0}: load 3 2 1 1 of 7, one slot of eight unused.
    given = _made(
        [[[0, 1], [1, 0], [2, 3], [0, 4]]],
        np.arange(4),
        np.array([0, 0, 1, 1]),
        header={"dropped_share": [0.125], "logit_norm": ["no number"]},
    )
    (row,) = reported.summary(given, permutations=20)
    np.testing.assert_allclose(row["load"], np.array([3, 2, 1, 1]) / 7)
    assert row["max_violation"] == pytest.approx(3 / 7 * 4 - 1)
    assert (row["dead_experts"], row["idle_share"], row["unused_share"]) == (0, 0, 1 / 8)
    assert row["dropped_share"] == 0.125 and row["logit_norm"] is None
    # {2, 3}: 1/4 over 1/16 is 4, excess 1/4 - 1/16; {0, 1}: 1/2 over 3/8 is 4/3, excess 1/8.
    assert [pair["columns"] for pair in row["pairs"]] == [[2, 3], [0, 1]]
    assert [pair["ratio"] for pair in row["pairs"]] == pytest.approx([4, 4 / 3])
    assert reported.pairs_text(row["pairs"]) == "2+3 ×4.0, 0+1 ×1.3"
    (alone,) = reported.summary(_made([[[0]] * 4], np.arange(4), np.zeros(4, int)))
    assert alone["mutual_information"] is None and alone["dead_experts"] == 3
