"""`moelab quantize`: what it writes, what it prints, what it records, and what it refuses in one line."""

import json
import re
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors

import moelab
from moelab import cli, environment, evaluate, manifest, quant
from moelab import config as configs
from moelab.quant import export, quantize, recipes, storage
from moelab.report import documents, statistics

CONFIG = dict(
    seed=3,
    model=dict(num_layers=3, width=32, num_heads=2, num_kv_heads=1, head_dim=16, dense_width=64),
    moe=dict(num_experts=4, expert_width=32, num_dense_layers=1),
    router=dict(kind="top_k", k=2),
    train=dict(num_steps=4, batch_size=2, length=16),
    schedule=dict(warmup_steps=1),
    tokenizer=dict(kind="byte"),
    evaluation=dict(every=4, tokens_per_domain=300, batch_size=4, precisions=("float32",)),
    checkpoint=dict(every=2),
)
LAYOUT = "nvfp4-pack-quantized"
pytestmark = pytest.mark.slow  # a training, calibrations and a dozen evaluations


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


@pytest.fixture
def main(capsys, monkeypatch):
    """Runs the command line in this process; returns its exit code and what it printed."""
    monkeypatch.setattr(environment, "prepare", lambda: None)

    def call(*argv):
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """Round to nearest in NVFP4, two rows, W4A4 with static scales exported."""
    out = tmp_path_factory.mktemp("made") / "q"
    options = quantize.Options(
        out=out,
        schemes=("w4a4", "w4a16"),
        layout=LAYOUT,
        calibration_tokens=2000,
        min_tokens=10,
    )
    return SimpleNamespace(out=out, found=quantize.quantize_run(run, options))


class TestWhatIsMade:
    def test_files(self, made):
        names = {path.name for path in made.out.iterdir()}
        files = {"model.safetensors", "quantized.json", "quality.json", "documents.parquet"}
        assert names == files | {LAYOUT}
        report = json.loads((made.out / "quality.json").read_text())
        assert [row["name"] for row in report["rows"]] == ["w4a4", "w4a16"]
        assert report["layers"] == [1, 2]

    def test_documents_give_the_differences_again(self, made):
        read = documents.read(made.out / "documents.parquet")
        assert read.precisions == ("float32", "w4a4", "w4a16")
        for row in made.found["rows"]:
            again = statistics.bits_per_byte_difference(read, "float32", row["name"])
            assert again._asdict() == pytest.approx(row["bits_per_byte_difference"], rel=1e-9)

    def test_losses_are_those_of_an_evaluation(self, made, run):
        names = ("float32", "nvfp4_w", "nvfp4_wa")
        section = evaluate.evaluate_run(run, precisions=names)
        plain, weights, both = (row["loss"] for row in section["rows"])
        rows = {row["name"]: row["loss"] for row in made.found["rows"]}
        for row in rows.values():
            assert row[0] == pytest.approx(plain, rel=1e-6)
        assert rows["w4a16"][1] == pytest.approx(weights, rel=1e-6)
        # The export carries static scales, so w4a4 is evaluated with them, not per token.
        assert made.found["activation_scale"] == "static"
        assert rows["w4a4"][1] != both and rows["w4a4"][1] == pytest.approx(both, rel=0.02)
        assert rows["w4a16"][1] != rows["w4a4"][1]
        assert made.found["rows"][0]["tokens"] == section["tokens"]

    def test_the_stored_run_evaluates_to_the_same_loss(self, made, run):
        packed, loaded = storage.load(made.out), evaluate.load_run(run)
        recipe = recipes.named("w4a16")
        variables, _ = evaluate.packed_variables(
            packed.rest, packed.quantized, packed.router_state, recipe
        )
        step = evaluate.make_step(evaluate.in_precision(loaded.config, loaded.dataset, recipe))
        batches = evaluate.batches_of(loaded.config, loaded.dataset, "test")
        part = loaded.dataset.split("test")
        found = evaluate.measure(step, variables, batches, len(part), (2, 4))
        loss = found.nats_D.sum() / found.token_count_D.sum()
        assert made.found["rows"][1]["loss"][1] == pytest.approx(loss, rel=1e-6)

    def test_per_token_scales_are_those_of_an_evaluation(self, run, tmp_path):
        options = quantize.Options(out=tmp_path / "q", schemes=("w4a4",))
        (row,) = quantize.quantize_run(run, options)["rows"]
        wanted = evaluate.evaluate_run(run, precisions=("float32", "nvfp4_wa"))["rows"][1]
        assert row["loss"][1] == pytest.approx(wanted["loss"], rel=1e-6)

    def test_a_search_by_the_outputs_calibrates(self, run, tmp_path):
        fields = {"search": "output"}
        options = quantize.Options(out=tmp_path / "q", method_fields=fields, min_tokens=10)
        assert quantize.quantize_run(run, options)["calibration"] is not None

    def test_packed_weights_are_those_of_pack(self, made, run):
        params = evaluate.load_run(run).state.params
        rest, quantized = quant.pack(params, recipes.named("w4a16"))
        packed = storage.load(made.out)
        for ours, theirs in ((packed.quantized, quantized), (packed.rest, rest)):
            assert jax.tree.structure(ours) == jax.tree.structure(theirs)
            pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)

    def test_facts_name_the_source(self, made, run):
        facts = json.loads((made.out / storage.FACTS).read_text())
        source = facts["source"]
        assert source["step"] == 4 and source["workdir"] == str(run)
        digest = manifest.read_manifest(run / "checkpoints", 4)["digest"]
        assert source["checkpoint_digest"] == digest
        config = configs.load(run).config
        assert source["config_sha256"] == configs.sha256(config)
        assert configs.sha256(configs.from_dict(facts["config"])) == source["config_sha256"]
        assert facts["method"]["kind"] == "rtn" and facts["rule"] == "amax"

    def test_calibration_is_recorded(self, made):
        calibrated = made.found["calibration"]
        assert (calibrated["fallback"], calibrated["split"]) == ("siblings", "train")
        tokens = [sum(layer["tokens"]) for layer in calibrated["layers"]]
        assert len(tokens) == 2 and tokens[0] == tokens[1] >= 2 * 1900  # two experts a token

    def test_bytes(self, made):
        sizes = made.found["bytes"]
        weights = 2 * 4 * 3 * 32 * 32
        assert sizes["quantized_weights"] == weights and sizes["bits_per_weight"] == 4.5
        assert sizes["unquantized_experts"] == {"float32": 4 * weights, "bf16": 2 * weights}
        assert sizes["file"] == (made.out / storage.TENSORS).stat().st_size

    def test_the_export_has_the_calibrated_input_scales(self, made):
        facts = storage.load(made.out).facts
        found = dict(safetensors.deserialize((made.out / LAYOUT / export.TENSORS).read_bytes()))
        for layer in (1, 2):
            for e in range(4):
                amax = facts["input_amax"][str(layer)]["down"][e]
                tensor = found[f"model.layers.{layer}.mlp.experts.{e}.down_proj.input_global_scale"]
                scale = np.frombuffer(tensor["data"], np.float32)
                assert scale == np.float32(2688) / np.float32(amax)
        assert made.found["export"]["experts"] == 8


class TestLayersInHighPrecision:
    def test_get_their_experts_back(self):
        """Plain trees stand in for parameters: nothing looks at the leaves."""
        sparse = {"router": 1, "experts": 2}
        params = {
            "head": 0,
            "segment_0": {"block_0": {"moe": sparse}, "block_1": {"moe": sparse}},
            "segment_1": {"block_0": {"moe": sparse}},
        }
        bare, packed = {"moe": {"router": 1}}, {"moe": {"experts": 3}}
        rest = {
            "head": 0,
            "segment_0": {"block_0": bare, "block_1": bare},
            "segment_1": {"block_0": bare},
        }
        quantized = {
            "segment_0": {"block_0": packed, "block_1": packed},
            "segment_1": {"block_0": packed},
        }
        before = json.dumps([rest, quantized])
        keep = frozenset({("segment_0", "block_1"), ("segment_1", "block_0")})
        kept_rest, kept = quantize.restored(params, rest, quantized, keep)
        assert kept == {"segment_0": {"block_0": packed}}
        assert kept_rest == params | {
            "segment_0": {"block_0": bare, "block_1": {"moe": sparse}},
        }
        assert json.dumps([rest, quantized]) == before


class TestCommand:
    def test_prints_tables_and_writes_the_same(self, main, run, tmp_path):
        out = tmp_path / "q"
        done = main(
            *("quantize", "--workdir", run, "--out", out, "--recipe=w4a16", "--format=mxfp4"),
            *("--rule=even", "--rest=bfloat16", "--split=validation", "--step=2"),
        )
        assert done.code == 0, done.err
        report = json.loads((out / "quality.json").read_text())
        assert (report["source"]["step"], report["split"]) == (2, "validation")
        assert (report["format"], report["rule"], report["rest_dtype"]) == (
            "mxfp4",
            "even",
            "bfloat16",
        )
        assert report["bytes"]["bits_per_weight"] == 4.25
        lines = done.out.splitlines()
        row = next(line for line in lines if line.startswith("w4a16 "))
        assert f"{report['rows'][0]['bits_per_byte'][1]['all']:.4f}" in row
        assert f"{report['rows'][0]['kl']['mean']:.5f}" in row
        assert sum(line.startswith("block 2") for line in lines) == 2
        assert "4.25 bits a weight" in done.err and f"written to {out}" in done.err
        rest = storage.load(out).rest
        assert rest["embedding"].dtype == ml_dtypes.bfloat16

    def test_json_is_the_report(self, main, run, tmp_path):
        out = tmp_path / "q"
        done = main(
            *("quantize", "--workdir", run, "--out", out, "--method=gptq", "--json"),
            *("--method_field", "damping=0.05", "--method_field", "activation_order=false"),
            *("--recipe=w4a4", "--activation_scale=static", "--min_tokens=100000"),
            *("--calibration_tokens=500", "--gate_weighted", "--fallback=all_tokens"),
        )
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found == json.loads((out / "quality.json").read_text())
        fields = found["method"]["fields"]
        assert (fields["damping"], fields["activation_order"]) == (0.05, False)
        calibrated = found["calibration"]
        assert calibrated["gate_weighted"] is True
        # no expert sees so many tokens: all take the fallback
        assert calibrated["layers"][0]["fallbacks"] == {"all_tokens": [0, 1, 2, 3]}
        assert found["activation_scale"] == "static"

    @pytest.mark.parametrize(
        ("method", "recipe", "matrices"),
        [("awq", "w4a16", ("gate_up", "down")), ("hadamard_gptq", "w4a4", ("gate", "up", "down"))],
    )
    def test_methods_that_change_the_rows(self, main, run, tmp_path, method, recipe, matrices):
        done = main(
            *(
                "quantize",
                "--workdir",
                run,
                "--out",
                tmp_path / "q",
                f"--method={method}",
                "--json",
            ),
            *(f"--recipe={recipe}", "--calibration_tokens=1000", "--min_tokens=1"),
        )
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert tuple(found["weights"]) == matrices
        # a factor or a rotation that is not undone would leave no signal at all
        assert all(weights["all"] > 15 for weights in found["weights"].values())
        (row,) = found["rows"]
        assert min(row["output_sqnr_db"]) > 12
        assert abs(row["loss"][1] - row["loss"][0]) < 0.05


class TestRefusals:
    """Exit code 2, one line that names the word, and nothing written."""

    def refused(self, main, tmp_path, run, *options):
        out = tmp_path / "q"
        done = main("quantize", "--workdir", run, "--out", out, *options)
        assert done.code == 2 and done.out == "" and not out.exists()
        (line,) = done.err.strip().splitlines()
        return line

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--recipe=w4a5", "did you mean --recipe=w4a4"),
            ("--recipe=", "--recipe has no ''"),
            ("--format=nvfp5", "did you mean --format=nvfp4?"),
            ("--format=mxfp8_e4m3", "--format has no 'mxfp8_e4m3'; there are nvfp4"),
            ("--method=gptqq", "did you mean --method=gptq?"),
            ("--rule=even", "--rule has no 'even'; there are amax"),
            ("--export=nvfp4-packed", "--export has no 'nvfp4-packed'"),
            ("--method=gptq --method_field dampin=1", "did you mean --method_field=damping?"),
            ("--method_field search", "--method_field wants NAME=VALUE, got 'search'"),
            ("--method=gptq --method_field damping=x", "damping wants float, got 'x'"),
            ("--method=gptq --method_field damping=100", "damping must be from 1e-06 to 10"),
            ("--method=gptq --method_field activation_order=1", "wants true or false, got '1'"),
            (
                "--method=hadamard_gptq --method_field rotation=64",
                "rotation=64 does not divide model",
            ),
            ("--method=four_over_six", "four_over_six cannot make nvfp4; allowed: nvfp4_46"),
            (f"--recipe=w4a8 --export={LAYOUT}", "has no w4a8; export w4a16 or w4a4"),
            (f"--format=mxfp4 --export={LAYOUT}", "holds nvfp4, .*; the experts are mxfp4"),
            ("--format=mxfp4 --activation_scale=static", "for the NVFP4 formats, not mxfp4"),
            ("--step=3", "no step 3 in "),
            ("--activation_scale=static", "is for w4a4, which is not among the recipes"),
            ("--recipe=w4a4,w4a4", "each recipe is named once, got w4a4, w4a4"),
            ("--split=train", "no --split choice 'train'"),
            ("--min_tokens=0", "min_tokens"),
        ],
    )
    def test_of_words(self, main, tmp_path, run, options, message):
        line = self.refused(main, tmp_path, run, *options.split())
        assert re.search(message, line)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (f"--method=awq --export={LAYOUT}", "method awq multiplies the rows that enter"),
            (f"--method=hadamard_gptq --export={LAYOUT}", "method hadamard_gptq rotates the rows"),
            (
                "--method=smoothquant --recipe=w4a4 --activation_scale=static",
                "method smoothquant transforms the rows",
            ),
        ],
    )
    def test_of_what_an_engine_would_have_to_do(self, main, tmp_path, run, options, message):
        options = (*options.split(), "--calibration_tokens=300", "--min_tokens=1")
        assert message in self.refused(main, tmp_path, run, *options)

    @pytest.mark.parametrize(
        ("section", "values", "message"),
        [
            ("moe", dict(num_experts=0), "the run has no experts"),
            ("moe", dict(slots_per_expert=1), "the run is Soft MoE"),
            ("moe", dict(activation="gpt_oss"), "the run has moe.activation=gpt_oss"),
            ("model", dict(width=40), "nvfp4 has blocks of 16, .* divide model.width=40"),
            ("moe", dict(expert_width=24), "nvfp4 has blocks of 16, .* divide moe.expert_width=24"),
        ],
    )
    def test_of_runs(self, main, tmp_path, folder, section, values, message):
        config = configs.from_dict(CONFIG | {section: CONFIG[section] | values})
        workdir = tmp_path / "run"
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps(configs.record(config)))
        assert re.search(message, self.refused(main, tmp_path, workdir))

    def test_of_folders(self, main, tmp_path, run):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "note").write_text("mine")
        done = main("quantize", "--workdir", run, "--out", tmp_path / "full")
        assert done.code == 2 and "full is there already and is not empty" in done.err
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["note"]
        assert "wants --out=DIR" in main("quantize", "--workdir", run).err
        assert "wants --workdir=RUN" in main("quantize", "--out", tmp_path / "q").err
        assert "is no run directory" in main("quantize", "--workdir", tmp_path, "--out=q").err
