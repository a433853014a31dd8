"""Config files, overrides, kinds, types, problems and hashes."""

import dataclasses
import json
import textwrap

import ml_collections
import pytest

from moelab import config, config_file, fields, schema

FILE = """
import ml_collections

PRESETS = {"": {}, "wide": {"model": {"width": 512}}}


def get_config(preset=""):
    config = ml_collections.ConfigDict()
    config.model = dict(width=64, remat=True)
    config.optimizer = dict(kind="muon", beta=0.9, learning_rate=0.5)
    config.update(PRESETS[preset])
    return config
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes text as the config file a.py in an empty working directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text=FILE, name="a.py"):
        (tmp_path / name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write


def body(*lines):
    """A config file whose get_config has these lines."""
    head = [
        "import ml_collections",
        "def get_config(preset=''):",
        "    c = ml_collections.ConfigDict()",
    ]
    return "\n".join([*head, *(f"    {line}" for line in lines), "    return c", ""])


def error(source, *overrides):
    """The one line that a load fails with."""
    with pytest.raises(config.ConfigError) as caught:
        config.load(source, overrides)
    (line,) = str(caught.value).splitlines()
    return line


class TestLoad:
    def test_fills_in_defaults_and_locks(self, file):
        c = config.load(file()).config
        assert (c.model.width, c.model.remat) == (64, True)
        assert c.model.num_layers == schema.Model().num_layers
        assert c.optimizer.newton_schulz_steps == schema.Muon().newton_schulz_steps
        assert c.router.kind == schema.DEFAULT_KIND["router"] and c.router.k == 2
        assert c.balance.switch_loss.coefficient == 0.0
        with pytest.raises(AttributeError):
            c.model.widht = 3
        with pytest.raises(TypeError):
            c.model.width = "3"

    def test_has_every_field_of_the_schema(self, file):
        c = config.load(file()).config
        paths = {path for path, _ in config.flatten(c)}
        assert {f"train.{name}" for name in schema.Train.__dataclass_fields__} <= paths
        assert paths == set(config.table(c))

    def test_names_the_file_and_what_was_overridden(self, file):
        loaded = config.load(f"{file()}:wide", ["model.num_layers=2", "--config.model.remat"])
        assert loaded.config.model.width == 512
        assert (loaded.name, loaded.file) == ("a-wide", "a.py:wide")
        assert loaded.overrides == ("--config.model.num_layers=2", "--config.model.remat")

    def test_bare_names_are_looked_up_in_experiments(self, file, tmp_path):
        (tmp_path / "experiments" / "old").mkdir(parents=True)
        file(name="experiments/first.py")
        file(name="experiments/old/second.py")
        assert config.load("first").file == "experiments/first.py"
        assert config.load("second:wide").file == "experiments/old/second.py:wide"
        assert config.load("old/second").file == "experiments/old/second.py"
        assert "did you mean second?" in error("secnod")
        assert "did you mean experiments/first.py?" in error("experiments/frist.py")
        file(name="experiments/old/first.py")
        assert config.load("first").file == "experiments/first.py"  # the whole name wins
        (tmp_path / "experiments" / "new").mkdir()
        file(name="experiments/new/second.py")
        assert "several configs have this name: experiments/new/second.py, " in error("second")

    def test_accepts_a_plain_dict(self, file):
        c = config.load(file("def get_config(preset=''): return {'model': {'width': 96}}")).config
        assert c.model.width == 96

    def test_references_inside_a_config_are_resolved(self, file):
        name = file(body("c.seed = 3", "c.train = dict(num_steps=c.get_oneway_ref('seed'))"))
        assert config.load(name).config.train.num_steps == 3


class TestBrokenFiles:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x = 1\n", "a.py:1: no function get_config"),
            ("x = 1\ndef get_config(:\n", "a.py:2: SyntaxError"),
            ("x = 1\n\nimport nowhere\n", "a.py:3: ModuleNotFoundError: No module named 'nowhere'"),
            (body("x = 1 / 0"), "a.py:4: ZeroDivisionError: division by zero"),
            (body("f = lambda: 1 / 0", "", "f()"), "a.py:4: ZeroDivisionError"),  # where it broke
            (body("raise ValueError('two\\nlines')"), "a.py:4: ValueError: two lines"),
            ("def get_config(preset=''): return 3", "wants to return a ConfigDict, got int"),
            (
                body("c.modle = dict(width=3)"),
                "a.py: modle.width: no such field; did you mean model.width?",
            ),
            (body("c.model = dict(widht=3)"), "did you mean model.width?"),
            (body("c.modle = dict()"), "a.py: modle: no such field"),
            (
                body("c.balance = dict(z_los=dict(coefficient=1))"),
                "did you mean balance.z_loss.coefficient?",
            ),
            (body("c.model = 3"), "model is a section, not a field"),
            (
                body("c.model = dict(width=dict(a=1))"),
                "model.width.a: no such field; did you mean model.width?",
            ),
            (body("c.model = dict(width=3.0)"), "a.py: model.width wants int, got float 3.0"),
            (body("c.model = dict(width=True)"), "model.width wants int, got bool True"),
            (
                body("c.model = dict(rope_base=False)"),
                "model.rope_base wants float (a finite number), got bool",
            ),
            (body("c.model = dict(rope_base=float('nan'))"), "got float nan"),
            (body("c.model = dict(width=None)"), "model.width wants int, got NoneType None"),
            (
                body("c.data = dict(domains='code')"),
                "data.domains wants tuple[str, ...], got str 'code'",
            ),
            (body("c.data = dict(domains=(1,))"), "data.domains wants str, got int 1"),
            (
                body("c.router = dict(kind='topk')"),
                "router.kind: no kind 'topk'; did you mean router.kind=top_k?",
            ),
            (body("c.router = dict(kind=['x'])"), "router.kind: no kind ['x']"),
            (body("c.optimizer = dict(nesterov=True)"), "it belongs to optimizer.kind=muon"),
        ],
    )
    def test_give_one_line(self, file, text, message):
        assert message in error(file(text))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("b.py", "b.py: no such config; did you mean a.py?"),
            ("a.py:wied", "no preset 'wied'; did you mean a.py:wide?"),
            ("a.py:xyz", "no preset 'xyz'; it has wide"),
            (".", "a folder without config.json"),
        ],
    )
    def test_missing_ones_too(self, file, source, message):
        file()
        assert message in error(source)

    def test_a_file_without_presets_has_none(self, file):
        assert "no preset 'x'; it has none" in error(file(body()) + ":x")


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "path", "value"),
        [
            ("model.width=128", "model.width", 128),
            ("model.rope_base=1", "model.rope_base", 1.0),
            ("model.rope_base=1e3", "model.rope_base", 1000.0),
            ("model.remat=false", "model.remat", False),
            ("model.remat=0", "model.remat", False),
            ("model.tied_head=TRUE", "model.tied_head", True),
            ("logging.tensorboard=1", "logging.tensorboard", True),
            ("logging.tensorboard", "logging.tensorboard", True),
            ("model.dtype=bfloat16", "model.dtype", "bfloat16"),
            ("data.domains=code,verse", "data.domains", ("code", "verse")),
            ("data.domains=(code, verse)", "data.domains", ("code", "verse")),
            ("data.domains=['code']", "data.domains", ("code",)),
            ("data.domains=code,", "data.domains", ("code",)),
            ("data.domains=()", "data.domains", ()),
            ("data.domains=", "data.domains", ()),
            ("seed=7", "seed", 7),
        ],
    )
    def test_take_the_type_of_their_field(self, file, override, path, value):
        got = dict(config.flatten(config.load(file(), [override]).config))[path]
        assert got == value and type(got) is type(value)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("model.width=16.5", "--config.model.width wants int, got '16.5'"),
            ("model.width=16.0", "--config.model.width wants int, got '16.0'"),
            ("model.width=abc", "--config.model.width wants int, got 'abc'"),
            ("model.width=", "--config.model.width wants int, got ''"),
            ("model.width", "--config.model.width wants int, got no value"),
            (
                "model.rope_base=inf",
                "--config.model.rope_base wants float (a finite number), got 'inf'",
            ),
            ("model.remat=yes", "--config.model.remat wants bool (true, false, 1 or 0), got 'yes'"),
            ("model.widht=1", "no such field; did you mean --config.model.width?"),
            ("model=1", "--config.model is a section, not a field; it has num_layers, width"),
            ("balance.z_loss=1", "--config.balance.z_loss is a section"),
            ("modle.width=1", "did you mean --config.model.width?"),
            ("colour=1", "--config.colour: no such field; there are"),
            ("model.colour=1", "; model has num_layers, width"),
            ("router.kind=topk", "did you mean --config.router.kind=top_k?"),
            ("optimizer.kind=sgd", "no kind 'sgd'; there are adamw, muon"),
            ("optimizer.b1=0.5", "it belongs to --config.optimizer.kind=adamw"),
        ],
    )
    def test_give_one_line_when_wrong(self, file, override, message):
        assert message in error(file(), override)

    def test_the_last_one_wins(self, file):
        assert config.load(file(), ["seed=1", "seed=2"]).config.seed == 2

    def test_kinds_come_first_wherever_they_stand(self, file):
        overrides = ["optimizer.b1=0.5", "optimizer.kind=adamw"]
        assert config.load(file(), overrides).config.optimizer.b1 == 0.5


class TestKinds:
    def test_changing_one_keeps_what_applies_and_says_what_it_drops(self, file):
        loaded = config.load(file(), ["optimizer.kind=adamw"])
        optimizer = loaded.config.optimizer
        assert optimizer.kind == "adamw"
        assert optimizer.learning_rate == 0.5  # of the file
        assert optimizer.b2 == schema.AdamW().b2
        assert "beta" not in optimizer
        (line,) = loaded.dropped
        assert line == "optimizer.beta=0.9 dropped: optimizer.kind=adamw does not have it"

    def test_naming_the_same_one_drops_nothing(self, file):
        loaded = config.load(file(), ["optimizer.kind=muon"])
        assert loaded.dropped == () and loaded.config.optimizer.beta == 0.9

    def test_a_field_of_another_type_does_not_apply(self, file, monkeypatch):
        def kind(name, wide):
            default = dataclasses.field(default=wide)
            fields_ = [
                ("kind", str, dataclasses.field(default=name)),
                ("wide", type(wide), default),
            ]
            return dataclasses.make_dataclass(name, fields_)

        kinds = {"whole": kind("whole", 3), "share": kind("share", 0.5)}
        monkeypatch.setitem(schema.KINDS, "schedule", kinds)
        monkeypatch.setitem(schema.DEFAULT_KIND, "schedule", "whole")
        loaded = config.load(file(body("c.schedule = dict(wide=7)")), ["schedule.kind=share"])
        assert loaded.config.schedule.wide == 0.5
        assert len(loaded.dropped) == 1 and loaded.dropped[0].startswith("schedule.wide=7 dropped")

    def test_routers_are_the_files_in_their_folder(self, file):
        name = file(body("c.router = dict(kind='top_k', k=3, score='sigmoid')"))
        loaded = config.load(name, ["router.kind=expert_choice"])
        assert loaded.config.router.k == 3
        assert loaded.dropped == (
            "router.score='sigmoid' dropped: router.kind=expert_choice does not have it",
        )
        assert fields.router_kinds() == tuple(sorted(fields.router_kinds()))
        assert {"top_k", "expert_choice"} <= set(fields.router_kinds())

    def test_what_the_model_sets_is_no_field(self, file):
        router = config.load(file()).config.router
        assert not {"num_experts", "parent", "name"} & set(router)


class TestProblems:
    def of(self, *overrides, num_devices=None):
        c = config.load("a.py", overrides).config
        return {problem.path: problem.message for problem in config.validate(c, num_devices)}

    @pytest.fixture(autouse=True)
    def _file(self, file):
        file(body())

    def test_the_defaults_have_none(self):
        assert self.of() == {}

    @pytest.mark.parametrize(
        ("overrides", "path", "fix"),
        [
            (["router.k=17"], "router.k", "at most moe.num_experts=16"),
            (["router.k=0"], "router.k", "at least 1"),
            (["model.num_kv_heads=3"], "model.num_kv_heads", "set it to 2"),
            (["model.head_dim=7"], "model.head_dim", "set it to 8"),
            (["model.num_layers=0"], "model.num_layers", "at least 1"),
            (["model.dtype=float16"], "model.dtype", "float32, bfloat16"),
            (["model.norm_epsilon=0"], "model.norm_epsilon", "greater than 0"),
            (["moe.num_dense_layers=5"], "moe.num_dense_layers", "at most model.num_layers=4"),
            (["moe.capacity_factor=-1"], "moe.capacity_factor", "at least 0"),
            (["moe.implementation=cuda"], "moe.implementation", "auto"),
            (["moe.activation=relu"], "moe.activation", "swiglu, gpt_oss"),
            (["moe.implementation=ragged_dot"], "moe.implementation", "cannot evaluate fp8_w"),
            (
                ["train.accumulation_steps=3"],
                "train.accumulation_steps",
                "divide train.batch_size=16",
            ),
            (["train.accumulation_steps=0"], "train.accumulation_steps", "at least 1"),
            (["schedule.warmup_steps=201"], "schedule.warmup_steps", "at most train.num_steps=200"),
            (
                ["schedule.kind=warmup_stable_decay", "schedule.decay_share=0.95"],
                "schedule.decay_share",  # 20 + 0.95 * 200 = 210 > 200
                "shorten",
            ),
            (["optimizer.learning_rate=0"], "optimizer.learning_rate", "greater than 0"),
            (["optimizer.b2=1"], "optimizer.b2", "less than 1"),
            (["schedule.final_scale=1.5"], "schedule.final_scale", "between 0 and 1"),
            (["evaluation.precisions=float32,nvfp5_w"], "evaluation.precisions", "nvfp4_w"),
            (["evaluation.precisions="], "evaluation.precisions", "must not be empty"),
            (["evaluation.precisions=bf16,bf16"], "evaluation.precisions", "once"),
            (["model.width=48"], "model.width", "set it to 64"),  # MXFP4's blocks of 32
            (["moe.expert_width=40"], "moe.expert_width", "set it to 64"),
            (
                ["moe.expert_width=40", "evaluation.precisions=nvfp4_w"],
                "moe.expert_width",  # NVFP4's blocks of 16
                "set it to 48",
            ),
            (["data.domains=code,vers"], "data.domains", "did you mean verse"),
            (["data.kind=text"], "data.path", "is empty"),
            (["data.kind=jsonl", "data.path=nowhere"], "data.path", "must exist"),
            (["tokenizer.vocab_size=256"], "tokenizer.vocab_size", "at least 257"),
            (
                ["data.kind=tokens", "data.path=.", "data.end_id=4096"],
                "data.end_id",
                "less than data.vocab_size=4096",
            ),
            (
                ["data.kind=tokens", "data.path=.", "data.vocab_size=70000"],
                "data.dtype",
                "uint32",
            ),
            (
                ["router.kind=batch_priority"],
                "router.kind",
                "set moe.capacity_factor above 0",
            ),
            (
                ["router.kind=expert_choice", "moe.capacity_factor=1"],
                "moe.capacity_factor",
                "must be 0",
            ),
            (["seed=4294967296"], "seed", "less than 2**32"),
            (["checkpoint.keep=0"], "checkpoint.keep", "at least 1"),
        ],
    )
    def test_each_names_its_field_and_the_fix(self, overrides, path, fix):
        problems = self.of(*overrides)
        assert list(problems) == [path]
        assert fix in problems[path]

    @pytest.mark.parametrize(
        ("router", "mechanism", "reason"),
        [
            ("router.kind=oracle", "z_loss.coefficient", "has no scores that training moves"),
            ("router.kind=uniform", "z_loss.coefficient", "has no scores"),
            ("router.kind=hash", "z_loss.coefficient", "has no scores"),
            ("router.kind=uniform", "entropy_loss.coefficient", "has no scores"),
            ("router.kind=hash", "adaptive_loss.coefficient", "learns nothing in its choice"),
            ("router.kind=oracle", "importance_loss.coefficient", "learns nothing"),
            ("router.kind=uniform", "loss_free_bias.rate", "takes no selection bias"),
            ("router.kind=expert_choice", "quantile_bias.rate", "takes no selection bias"),
            ("router.kind=expert_choice", "switch_loss.coefficient", "an equal load"),
            ("router.kind=base", "adaptive_loss.coefficient", "an equal load"),
            ("moe.slots_per_expert=1", "switch_loss.coefficient", "Soft MoE has an equal load"),
            ("moe.slots_per_expert=1", "loss_free_bias.rate", "Soft MoE takes no selection bias"),
            ("moe.num_experts=2", "switch_loss.coefficient", "chooses every expert"),
            ("moe.num_experts=2", "loss_free_bias.rate", "chooses every expert"),
        ],
    )
    def test_balancing_that_could_move_nothing(self, router, mechanism, reason):
        problems = self.of(router, f"balance.{mechanism}=0.5")
        assert list(problems) == [f"balance.{mechanism}"]
        assert reason in problems[f"balance.{mechanism}"]
        assert problems[f"balance.{mechanism}"].startswith("steers nothing: ")

    @pytest.mark.parametrize(
        "overrides",
        [
            ["router.kind=hash", "router.weights=score", "balance.z_loss.coefficient=1"],
            ["router.kind=expert_choice", "balance.z_loss.coefficient=1"],
            ["router.kind=expert_choice", "balance.importance_loss.coefficient=1"],
            ["router.kind=sinkhorn", "balance.switch_loss.coefficient=1"],
            # Experts that choose have equal loads over the batch, not over each sequence.
            [
                "router.kind=expert_choice",
                "balance.switch_loss.coefficient=1",
                "balance.switch_loss.scope=sequence",
            ],
            ["moe.slots_per_expert=1", "balance.z_loss.coefficient=1"],
            ["moe.num_experts=0", "router.kind=uniform", "balance.z_loss.coefficient=1"],
        ],
    )
    def test_balancing_that_moves_something(self, overrides):
        assert self.of(*overrides) == {}

    def test_a_field_of_balancing_that_its_scope_does_not_read(self):
        on = ["balance.switch_loss.coefficient=1", "balance.switch_loss.counts=last_step"]
        assert self.of(*on, "balance.switch_loss.scope=global_batch") == {}
        for scope in ("sequence", "micro_batch"):
            problems = self.of(*on, f"balance.switch_loss.scope={scope}")
            assert list(problems) == ["balance.switch_loss.counts"]
            assert scope in problems["balance.switch_loss.counts"]

    @pytest.mark.parametrize(
        "overrides",
        [
            ["moe.expert_width=40", "evaluation.precisions=float32,bf16"],  # nothing in blocks
            ["moe.expert_width=48", "evaluation.precisions=nvfp4_w"],
            ["moe.implementation=ragged_dot", "evaluation.precisions=float32,bf16"],
            ["moe.implementation=reference"],
            ["moe.num_experts=0", "moe.expert_width=40", "router.k=3"],  # no experts at all
            ["router.k=16"],
            ["schedule.warmup_steps=200"],
            ["schedule.kind=warmup_stable_decay", "schedule.decay_share=0.9"],  # 20 + 180 = 200
            ["train.accumulation_steps=16"],
        ],
    )
    def test_edges_are_right(self, overrides):
        assert self.of(*overrides) == {}

    def test_all_are_listed_at_once_in_the_order_of_the_sections(self):
        problems = self.of("router.k=99", "model.head_dim=3", "train.length=0", "seed=-1")
        assert list(problems) == ["seed", "model.head_dim", "train.length", "router.k"]

    def test_batches_are_shared_by_the_devices(self):
        assert self.of(num_devices=8) == {}
        assert list(self.of(num_devices=3)) == ["train.batch_size", "evaluation.batch_size"]
        # 16 sequences in 4 micro-batches of 4, which 8 devices cannot share.
        assert list(self.of("train.accumulation_steps=4", num_devices=8)) == ["train.batch_size"]

    def test_routers_and_mechanisms_may_add_theirs(self, monkeypatch):
        from moelab.balance import z_loss

        added = lambda values, c: [("coefficient", f"is odd with {c.moe.num_experts} experts")]  # noqa: E731
        monkeypatch.setattr(z_loss, "validate", added, raising=False)
        assert self.of() == {}  # asked where the mechanism is on
        found = self.of("balance.z_loss.coefficient=0.1")
        assert found == {"balance.z_loss.coefficient": "is odd with 16 experts"}

    def test_routers_without_checks_still_have_k_checked(self, monkeypatch):
        from moelab.routers import top_k

        monkeypatch.delattr(top_k, "validate")
        assert list(self.of("router.k=17")) == ["router.k"]
        assert list(self.of("router.k=0")) == ["router.k"]
        assert self.of("router.k=16") == {}
        assert self.of("router.k=3", "moe.num_experts=0") == {}


class TestHash:
    def test_is_of_what_differs_from_the_defaults(self, file):
        plain = config.load(file(body())).config
        spelt = config.load(file(body("c.model = dict(width=256)", "c.seed = 0"), "b.py")).config
        assert config.sha256(plain) == config.sha256(spelt)
        # sha256 of {"config":{},"schema":2}
        assert config.sha256(plain).startswith(EMPTY[:16])

    def test_counts_every_hashed_field(self, file):
        c = config.load(file(body())).config
        seen = {config.sha256(c)}
        for path, field in config.table(c).items():
            if path.partition(".")[0] in schema.UNHASHED or path.endswith(".kind"):
                continue
            text = {"bool": str(not field.default), "int": "77", "float": "0.77"}.get(
                field.type, "x"
            )
            changed = config.sha256(config.load("a.py", [f"{path}={text}"]).config)
            assert changed not in seen, path
            seen.add(changed)

    def test_leaves_out_when_and_where_things_are_written(self, file):
        name = file(body())
        changed = ["checkpoint.every=7", "logging.tensorboard=true"]
        assert config.sha256(config.load(name).config) == config.sha256(
            config.load(name, changed).config
        )

    def test_counts_the_kind_and_the_schema(self, file, monkeypatch):
        name = file(body())
        before = config.sha256(config.load(name).config)
        assert config.sha256(config.load(name, ["optimizer.kind=muon"]).config) != before
        monkeypatch.setattr(schema, "SCHEMA", schema.SCHEMA + 1)
        assert config.sha256(config.load(name).config) != before


# printf '{"config":{},"schema":2}' | sha256sum
EMPTY = "c1b2635d316ecd3f33a46944ce2dc2a37cdd29c48a0bd9e1e0a9df3edbd50a8d"


class TestSaved:
    def test_a_config_survives_json(self, file):
        loaded = config.load(file(), ["data.domains=code"])
        record = json.loads(json.dumps(config.record(loaded.config, loaded.file, loaded.overrides)))
        assert record["schema"] == schema.SCHEMA
        assert record["config_sha256"] == config.sha256(loaded.config)
        assert record["overrides"] == ["--config.data.domains=code"]
        again = config.from_dict(record["config"])
        assert config.canonical(again) == config.canonical(loaded.config)
        assert again.data.domains == ("code",) and again.is_locked

    def test_canonical_is_sorted_json_without_spaces(self, file):
        text = config.canonical(config.load(file()).config)
        assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))

    def test_is_data_not_code(self):
        with pytest.raises(
            config.ConfigError, match="model.wdith: no such field; did you mean model.width"
        ):
            config.from_dict({"model": {"wdith": 3}})
        with pytest.raises(config.ConfigError, match="wants int"):
            config.from_dict({"model": {"width": "__import__('os')"}})

    def test_a_run_directory_is_a_config(self, file, tmp_path):
        loaded = config.load(file())
        run = tmp_path / "runs" / "x"
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(config.record(loaded.config)))
        for source in ("runs/x", "runs/x/config.json"):
            again = config.load(source, ["seed=3"])
            assert again.config.model.width == 64 and again.config.seed == 3
            assert again.name == "x"
        (run / "config.json").write_text("{")
        assert "not a saved config" in error("runs/x")

    def test_differences_name_both_values(self, file):
        a = config.load(file()).config
        b = config.load("a.py", ["optimizer.kind=adamw", "seed=1"]).config
        found = {path: (x, y) for path, x, y in config.differences(a, b)}
        assert found["seed"] == (0, 1)
        assert found["optimizer.beta"] == (0.9, None)
        assert found["optimizer.b1"] == (None, 0.9)
        assert "optimizer.learning_rate" not in found


class TestDirectory:
    def save(self, run, c):
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text(json.dumps(config.record(c)))

    def test_may_be_new_empty_or_of_the_same_hash(self, file, tmp_path):
        c = config.load(file()).config
        config.check_directory(c, tmp_path / "new")
        (tmp_path / "empty").mkdir()
        config.check_directory(c, tmp_path / "empty")
        for name in (".lock", ".tmp-7"):  # of a run that was killed at once
            (tmp_path / "empty" / name).touch()
        config.check_directory(c, tmp_path / "empty")
        self.save(tmp_path / "run", c)
        config.check_directory(config.load("a.py", ["checkpoint.every=3"]).config, tmp_path / "run")

    def test_of_another_config_is_refused_with_the_differences(self, file, tmp_path):
        c = config.load(file()).config
        self.save(tmp_path / "run", c)
        other = config.load("a.py", ["seed=5", "checkpoint.every=3"]).config
        with pytest.raises(config.ConfigError, match=r"seed \(0 there, 5 now\)$"):
            config.check_directory(other, tmp_path / "run")

    def test_of_something_else_is_refused(self, file, tmp_path):
        c = config.load(file()).config
        with pytest.raises(config.ConfigError, match="not empty"):
            config.check_directory(c, tmp_path)
        with pytest.raises(config.ConfigError, match="is a file"):
            config.check_directory(c, tmp_path / "a.py")


class TestFields:
    def test_have_their_documentation(self, file):
        known = config.table(config.load(file()).config)
        assert known["model.width"].doc == "model width D"
        # A default over several lines: its comment comes after the closing parenthesis.
        assert known["evaluation.precisions"].doc.startswith("names of quant.recipes")
        assert known["router.k"].doc == "experts per token"
        assert [path for path, field in known.items() if not field.doc] == []

    def test_never_default_to_none(self, file):
        known = config.table(config.load(file()).config)
        assert all(field.default is not None for field in known.values())

    def test_of_every_kind_have_a_type_and_a_doc(self):
        for section in schema.DEFAULT_KIND:
            for kind in fields.kinds(section):
                for field in fields.of_kind(section, kind).values():
                    assert field.doc, (kind, field.path)
                    assert fields.coerce(field.type, field.default) == field.default

    def test_a_router_field_that_no_config_can_hold_is_refused(self):
        @dataclasses.dataclass
        class Router:
            num_experts: int
            temperature: float | None = None

        with pytest.raises(TypeError, match="router.temperature: a config field needs a default"):
            fields.of_class("router", Router)

    def test_an_int_default_of_a_float_field_is_a_float(self):
        @dataclasses.dataclass
        class Mechanism:
            rate: float = 0
            sizes: tuple[int, ...] = ()

        found = fields.of_class("balance.x", Mechanism)
        assert found["balance.x.rate"].type == "float"
        assert type(found["balance.x.rate"].default) is float
        assert fields.parse(found["balance.x.sizes"].type, "1,2") == (1, 2)


def test_outline_reads_presets_and_docstring_without_running(file, tmp_path):
    file('"""First.\n\nMore."""\nPRESETS = {"": 0, "x": 1}\nraise SystemExit\n')
    assert config_file.outline(tmp_path / "a.py") == ("First.", ["x"])


def test_files_with_an_underscore_are_no_experiments(file, tmp_path):
    (tmp_path / "experiments").mkdir()
    file(name="experiments/_parts.py")
    file(name="experiments/whole.py")
    names = [name for name, _ in config_file.files()]
    assert "whole" in names and "_parts" not in names


def test_from_dict_takes_a_config_dict():
    nested = ml_collections.ConfigDict({"moe": {"num_experts": 4}})
    assert config.from_dict(nested.to_dict()).moe.num_experts == 4
