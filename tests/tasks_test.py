"""moelab/tasks: what is asked, and the rows that known nats give. No model is run but in the last tests."""

import collections
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from moelab import cli, data, evaluate, model, schema, scoring, task, tasks
from moelab.data import mixture
from moelab.data.tokenizer import Bytes
from moelab.report import task_table
from moelab.tasks import facts, minimal_pairs, seen_bigrams

LENGTH = 64
VOCAB = 257
TEXTS = {
    "wiki_en": "Stone {i} was an old place. It is near a river and has walls. These were high.",
    "code": "def f{i}(x):\n    return g(x[0])\n",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two domains with the names of the corpus's, in bytes; every fifth document of `code` is the same text."""
    root = tmp_path_factory.mktemp("tasks")
    for domain, text in TEXTS.items():
        (root / "text" / domain).mkdir(parents=True)
        for i in range(200):
            number = 0 if domain == "code" and i % 5 == 0 else i
            (root / "text" / domain / f"{i}.txt").write_text(text.format(i=number))
    return data.build(schema.TextFolder(path=str(root / "text")), schema.Byte(), cache=root)


def ask(kind, dataset, length=LENGTH, **fields):
    made = tasks.make(kind, **fields)
    return made, made.ask(dataset, length)


def uniform(asked):
    return [np.full(len(span.token_S), math.log(VOCAB)) for span in asked.spans]


def test_the_likeliest_choice_wins_and_ties_share():
    choices = [
        task.Choice([1], [[2], [3], [4]], "a"),
        task.Choice([], [[2, 3], [4]], "b"),
        task.Choice([], [[2], [4]], "c"),
    ]
    nats = [[9, 1.0], [9, 1.0], [9, 2.0]]  # a: the first two tie, so half
    nats += [[1.0, 1.0], [1.5]]  # b: 2.0 against 1.5 in all, 1.0 against 1.5 per token
    nats += [[math.nan], [1.0]]  # c: not a number says nothing
    nats = [np.array(n) for n in nats]
    assert task.chosen_right(choices, nats, per_token=False)[:2].tolist() == [0.5, 0]
    right = task.chosen_right(choices, nats, per_token=True)
    assert right[:2].tolist() == [0.5, 1] and math.isnan(right[2])
    for groups in ("abc", "aab"):
        row = task.share_row("t", "m", right, groups, 0.5)
        assert [math.isnan(number) for number in row[2:5]] == [True] * 3


def test_a_long_context_loses_its_beginning_and_a_long_choice_is_dropped():
    choices = [task.Choice([1, 2, 3], [[4, 5], [6]], "a"), task.Choice([1], [[2] * 5, [3]], "b")]
    spans, kept, dropped = task.ask_choices(choices, 4)
    assert [span.token_S.tolist() for span in spans] == [[2, 3, 4, 5], [2, 3, 6]]
    assert (len(kept), dropped) == (1, 1)


def test_the_interval_of_independent_items_is_wilsons():
    """8 of 10: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.95996: 0.4902 and 0.9433."""
    row = task.share_row("t", "m", np.array([1.0] * 8 + [0.0] * 2), range(10), 0.5)
    assert row.value == 0.8 and row.n == 10
    np.testing.assert_allclose([row.low, row.high], [0.4902, 0.9433], atol=1e-4)


def test_the_interval_of_grouped_items_is_over_groups():
    """Ten groups of ten equal answers say as much as ten items, so the interval is as wide as over ten."""
    right_N = np.repeat([1.0] * 5 + [0.0] * 5, 10)
    row = task.share_row("t", "m", right_N, np.repeat(range(10), 10).tolist(), 0.5)
    assert (row.value, row.n) == (0.5, 10)
    assert row.high - row.low > 0.5  # 0.2 if the hundred were independent


def test_items_that_are_all_right_do_not_show_that_none_is_wrong():
    """3 groups of 10: Wilson's 3 of 3, low = 3 / (3 + z^2) = 0.4385."""
    row = task.share_row("t", "m", np.ones(30), [i // 10 for i in range(30)], 0.5)
    assert (row.value, row.n) == (1.0, 3)
    np.testing.assert_allclose([row.low, row.high], [0.4385, 1.0], atol=1e-4)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_uniform_predictions_score_chance(kind, dataset):
    if kind == "facts":
        pytest.skip("wants the corpus; below")
    made, asked = ask(kind, dataset)
    assert all(1 <= len(span.token_S) <= LENGTH for span in asked.spans)
    rows = made.answer(asked, uniform(asked))
    assert rows and {row.task for row in rows} == {kind}
    for row in rows:
        assert row.low <= row.value <= row.high
        if kind == "minimal_pairs":  # the choices differ in length: whichever is shorter costs less
            continue
        np.testing.assert_allclose(row.value, row.chance, rtol=1e-6, atol=1e-9)


def test_recall_by_the_context_is_perfect(dataset):
    made, asked = ask("recall", dataset, items=20)

    def cost(span):
        *pairs, key, value = span.token_S.tolist()
        known = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return np.array([5.0] * (len(pairs) + 1) + [0.0 if known[key] == value else 5.0])

    rows = made.answer(asked, [cost(span) for span in asked.spans])
    assert [(row.measure, row.value, row.chance) for row in rows] == [
        ("2 pairs", 1.0, 0.5),
        ("8 pairs", 1.0, 0.125),
    ]
    for span in asked.spans:
        tokens = span.token_S.tolist()[:-2]
        assert len(set(tokens)) == len(tokens) and 256 not in tokens


def test_recall_says_what_does_not_fit(dataset):
    _, asked = ask("recall", dataset, length=8)
    assert asked.dropped == 200 and [count for count, _ in asked.about] == [2]
    with pytest.raises(task.TaskError, match="more than 4 tokens"):
        ask("recall", dataset, length=4)


def test_induction_counts_what_the_second_copy_saves(dataset):
    made, asked = ask("induction", dataset, items=5, tokens=8)
    for span in asked.spans:
        np.testing.assert_array_equal(span.token_S[:8], span.token_S[8:])
    # The first copy costs 4 a token, the second 1; first tokens (0 and 100 here) do not count.
    cost = np.array([0, *[4.0] * 7, 100, *[1.0] * 7])
    (row,) = made.answer(asked, [cost] * 5)
    assert (row.value, row.chance, row.n) == (3.0, 0.0, 5)


@pytest.mark.parametrize(
    ("text", "pair", "wanted"),
    [
        ("It is so. They are.", ("is", "are"), [("It", " is so.", " are so.")]),
        ("It was an old, bad one\nA new", ("a", "an"), [("It was", " an old, bad one", " a old, bad one")]),
        ("Vitamin a (food)", ("a", "an"), []),  # no word follows
        ("Is it? is it", ("is", "are"), [("Is it?", " is it", " are it")]),
        ("This is", ("this", "these"), []),  # the beginning of a sentence is no place
        ("f(x[1])\ny", None, [("f(x[1", "])", "))"), ("f(x[1]", ")", "]")]),
    ],
)  # fmt: skip
def test_places_of_minimal_pairs(text, pair, wanted):
    assert list(minimal_pairs.places(text, pair)) == wanted


def test_minimal_pairs_prefer_the_real_text(dataset):
    made, asked = ask("minimal_pairs", dataset, items=20)
    held_out = dataset.split("test")
    real = {dataset.tokenizer.decode(held_out.document(i)) for i in range(len(held_out))}
    cost = [
        np.full(len(s.token_S), 1.0 if _within(s.token_S, dataset, real) else 3.0)
        for s in asked.spans
    ]
    rows = {row.measure: row for row in made.answer(asked, cost)}
    assert set(rows) == {
        "is/are",
        "was/were",
        "has/have",
        "a/an",
        "bracket",
    }  # no "this" in the text
    assert all(row.value == 1 and row.chance == 0.5 for row in rows.values())
    groups = collections.Counter(choice.group for choice in dict(asked.about)["bracket"])
    assert set(groups.values()) == {2}  # of three brackets in a document
    assert rows["bracket"].n == len(groups)  # which are dependent


def _within(token_S, dataset, texts):
    text = dataset.tokenizer.decode(token_S.tolist())
    return any(text in one for one in texts)


def test_seen_bigrams_divides_every_token(dataset):
    assert seen_bigrams.seen_before(np.array([1, 2, 1, 2, 3])).tolist() == [0, 0, 0, 1, 0]
    made, asked = ask("seen_bigrams", dataset, documents=3)
    cost = [np.where(seen_bigrams.seen_before(span.token_S), 1.0, 2.0) for span in asked.spans]
    rows = made.answer(asked, cost)
    assert [(row.measure, row.value) for row in rows] == [
        ("seen before in the window", 1.0),
        ("new", 2.0),
    ]


def test_memorisation_is_the_gap_between_splits(dataset):
    made, asked = ask("memorisation", dataset, documents=10)
    cost = {"test": 3.0, "train": 2.0, "repeated": 0.5}
    nats = [
        np.full(len(span.token_S), cost[name])
        for (name, _), span in zip(asked.about, asked.spans, strict=True)
    ]
    rows = {row.measure: row for row in made.answer(asked, nats)}
    assert rows["test minus training"].value == 1.0
    assert rows["test minus repeated training"].value == 2.5
    # Only `code` repeats a text, and it counts once.
    repeated = [
        span.token_S.tobytes()
        for (name, _), span in zip(asked.about, asked.spans, strict=True)
        if name == "repeated"
    ]
    assert len(repeated) == 1


def test_memorisation_is_of_text_as_it_was_written(dataset):
    """What an injector changed is left out, or noise would pass for the opposite of memory; a copy is text repeated."""
    path = str(dataset.directory.parent.parent / "text")
    section = schema.TextFolder(
        path=path, inject=("token_noise share=0.5 rate=0.5", "duplicate share=0.2 copies=3")
    )
    dirty = data.build(section, schema.Byte(), cache=dataset.directory.parent)
    made, asked = ask("memorisation", dirty, length=1000, documents=1000)  # whole documents
    table = dirty.quality
    texts = collections.Counter(
        dirty.split("train").document(i).tobytes() for i in range(len(dirty.split("train")))
    )
    clean = sum(1 for k in table.kind_N if table.kinds[k] == "clean")
    spans = collections.defaultdict(list)
    for (name, _), span in zip(asked.about, asked.spans, strict=True):
        spans[name].append(span.token_S.astype(np.uint16).tobytes())
    assert 0 < len(spans["train"]) + len(spans["repeated"]) <= clean < len(table)
    written = {
        dataset.split("train").document(i).tobytes() for i in range(len(dataset.split("train")))
    }
    assert {*spans["train"], *spans["repeated"]} <= written
    assert all(texts[text] == 1 for text in spans["train"])
    assert spans["repeated"] and all(texts[text] > 1 for text in spans["repeated"])


def test_tasks_see_the_pool_that_the_run_draws_from(dataset):
    pool = mixture.pooled(dataset, schema.Mixture(unique_tokens=4000), 10**6)
    train, all_of_it = pool.split("train"), dataset.split("train")
    assert 3500 < train.num_tokens_N.sum() < 4500 < all_of_it.num_tokens_N.sum()
    assert set(train.ids) < set(all_of_it.ids) and set(train.domain_N) == {0, 1}
    chosen = np.flatnonzero(
        mixture.subset(dataset, all_of_it, schema.Mixture(unique_tokens=4000), 10**6)
    )
    for new, old in enumerate(chosen.tolist()):
        assert train.ids[new] == all_of_it.ids[old]
        np.testing.assert_array_equal(train.document(new), all_of_it.document(old))
    assert pool.split("test") is dataset.split("test")
    weighted = schema.Mixture(domain_weights=("code=1", "*=0"))
    names = mixture.pooled(dataset, weighted, 10**6).split("train")
    code = dataset.domains.index("code")
    assert set(names.domain_N) == {code} and len(names) == len(all_of_it.of_domain(code))
    _, asked = ask("memorisation", pool, documents=1000)
    assert sum(name != "test" for name, _ in asked.about) <= len(train)


def corpus_like():
    """What `facts` asks of a dataset of the corpus."""
    return SimpleNamespace(
        manifest={"kind": "corpus", "fallback": False}, domains=("wiki_en",), tokenizer=Bytes()
    )


def test_facts_are_of_one_topic_and_not_in_the_text():
    entries = facts._entries()
    for split in ("train", "test"):
        found = facts.Task(items=30).facts(split)
        assert len(found) == 30 == len({fact.id for fact in found})
        for fact in found:
            title, description, topic = entries[fact.id]
            assert (fact.title, fact.description) == (title, description)
            assert len({fact.description.lower(), *(w.lower() for w in fact.wrong)}) == 4
            same_topic = {d for _, d, t in entries.values() if t == topic}
            assert same_topic >= set(fact.wrong)
    assert not {f.id for f in facts.Task().facts("train")} & {
        f.id for f in facts.Task().facts("test")
    }


@pytest.mark.parametrize("right", [0.5, 2.0])
def test_facts_by_the_description(right):
    """Whoever knows the right descriptions is always right; whoever has them backwards, never."""
    dataset, made = corpus_like(), facts.Task(items=12)
    asked = made.ask(dataset, 512)
    about = {fact.title: fact.description for s in ("train", "test") for fact in made.facts(s)}
    nats = []
    for i, span in enumerate(asked.spans):
        text = dataset.tokenizer.decode(span.token_S.tolist())
        title, _, description = text.partition(": ")
        # Without a title, the right one is the first of four.
        hit = about[title] == description if title in about else i % 4 == 0
        nats.append(np.full(len(span.token_S), right if hit else 1.0))
    rows = made.answer(asked, nats)
    assert [row.measure for row in rows] == [
        "train articles",
        "train articles, without the title",
        "test articles",
        "test articles, without the title",
    ]
    assert {row.value for row in rows} == {1.0 if right < 1 else 0.0}
    assert {row.chance for row in rows} == {0.25}


def test_facts_want_the_corpus(dataset):
    with pytest.raises(task.TaskError, match="wants the corpus"):
        ask("facts", dataset)


def test_nats_come_back_in_order_and_without_padding():
    """A model that charges its target, by number: spans of several lengths, in several batches."""
    shapes = []

    def step(variables, batch):
        shapes.append(batch.token_BL.shape)
        assert (batch.token_BL[batch.mask_BL] != batch.target_BL[batch.mask_BL]).all()
        return batch.target_BL * variables

    spans = [task.Span(np.arange(1, n + 1, dtype=np.int32), 0) for n in (3, 40, 17, 1, 33, 2)]
    found = scoring.nats(step, 0.5, spans, length=40, batch_tokens=80, end_id=0)
    for span, nats in zip(spans, found, strict=True):
        np.testing.assert_array_equal(nats, span.token_S * 0.5)
    assert shapes == [(5, 16), (2, 32), (2, 40)]
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        scoring.nats(step, 0.5, spans, length=8, batch_tokens=80, end_id=0)


def test_a_span_costs_what_evaluation_says():
    """The same tokens, alone and padded among others, through a model."""
    config = tiny.make_config()
    built = model.from_config(config, VOCAB)
    variables = model.init(built, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 256, (3, 16)).astype(np.int32)
    shifted = np.concatenate([np.full((3, 1), 256, np.int32), tokens[:, :-1]], axis=1)
    whole = np.ones((3, 16), bool)
    domain_B, document_BL = np.full(3, -1, np.int32), np.zeros((3, 16), np.int32)
    batch = data.Batch(shifted, tokens, whole, domain_B, document_BL)
    wanted, _ = jax.jit(lambda v, b: evaluate.forward(built, v, b))(variables, batch)
    spans = [task.Span(row[:size]) for row, size in zip(tokens, (16, 5, 9), strict=True)]
    step = scoring.make_step(built)
    found = scoring.nats(step, variables, spans, length=16, batch_tokens=64, end_id=256)
    for row, nats in zip(np.asarray(wanted), found, strict=True):
        np.testing.assert_allclose(nats, row[: nats.size], rtol=2e-5, atol=2e-5)


def test_the_table_names_what_was_left_out():
    row = task.Row("facts", "train articles", 0.31, 0.27, 0.36, 0.25, 400, "share")._asdict()
    table = task_table.make([{"precision": "float32", **row}])
    assert [cell.line for cell in table.rows[0]] == [
        *("facts", "train articles", "float32", "0.310 [0.270, 0.360]", "0.250", "400", "share")
    ]
    notes = task_table.notes({"left_out": {"facts": "why"}, "dropped": {"recall": 3}, "leak": ""})
    assert notes[0] == "facts was left out: why" and "recall: 3 items" in notes[1]


def test_a_dense_model_is_not_asked_in_formats_of_experts(tmp_path, monkeypatch):
    import small_run

    from moelab import config as configs
    from moelab import train

    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    changes = dict(
        evaluation=dict(precisions=("float32", "bf16", "nvfp4_wa"), tasks=("induction",))
    )
    changes |= dict(moe=dict(num_experts=0), balance=dict(switch_loss=dict(coefficient=0.0)))
    config = configs.from_dict(small_run.config_with(small_run.write_text(text), **changes))
    evaluation = train.run(config, tmp_path / "run").card["evaluation"]
    rows = [row["precision"] for row in evaluation["rows"]]
    assert rows == [row["precision"] for row in evaluation["tasks"]["rows"]] == ["float32", "bf16"]


def test_the_command_asks_a_run_and_the_card_keeps_what_it_asked(tmp_path, monkeypatch, capsys):
    import small_run

    from moelab import config as configs
    from moelab import train
    from moelab.report import verify

    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text"
    text.mkdir()
    changes = dict(
        evaluation=dict(precisions=("float32", "nvfp4_wa"), tasks=("induction", "facts"))
    )
    config = configs.from_dict(small_run.config_with(small_run.write_text(text), **changes))
    card = train.run(config, tmp_path / "run").card
    kept = card["evaluation"]["tasks"]
    asked = [(row["task"], row["precision"]) for row in kept["rows"]]
    assert asked == [("induction", "float32"), ("induction", "nvfp4_wa")]
    assert "wants the corpus" in kept["left_out"]["facts"]
    assert "Beyond the loss" in (tmp_path / "run" / "RESULT.md").read_text()
    assert "facts was left out" in (tmp_path / "run" / "report.html").read_text()
    assert verify.verify(tmp_path / "run") == []

    words = ["eval", f"--workdir={tmp_path / 'run'}", "--tasks=induction", "--json"]
    assert cli.main([*words, "--precisions=float32,nvfp4_wa"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["precision"] for row in found["rows"]] == ["float32", "nvfp4_wa"]
    assert found["rows"] == kept["rows"]
    assert cli.main([*words[:2], "--tasks=fact"]) == 2
    assert "did you mean --tasks=facts?" in capsys.readouterr().err
