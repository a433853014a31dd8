"""moelab/data/quality/filters: each rule worked by hand, and what each tool sees and does not see."""

import dataclasses

import numpy as np
import pytest

from moelab.data import DataError, tokenizer
from moelab.data.document import Document
from moelab.data.quality import (
    chain,
    filters,
    inject,
    parse_filters,
    parse_injectors,
    ranking,
    shingles,
    spec,
    truth,
)
from moelab.data.quality.contract import CLEAN
from moelab.data.quality.filters import dsir, minhash, substring
from moelab.data.quality.pool import Pool
from moelab.data.quality.table import Table
from moelab.data.split import split_of
from tests.quality_inject_test import Source

LEARNING = ["classifier", "dsir", "perplexity_ngram"]
SENTENCE = (
    "The boats of the harbour were tied to the wall and nobody had come to see them that day. "
)


def train_id(name):
    """An id that falls into the training split of domain d."""
    return next(f"{name}{i}" for i in range(100) if split_of("d", f"{name}{i}") == "train")


def judge(text, texts, domain="d"):
    """Verdicts of a filter on texts, all of them training documents."""
    given = [Document(domain, train_id(f"{number}-"), one) for number, one in enumerate(texts)]
    pool = Pool(Source(given), (), tokenizer.Bytes())
    (tool,) = parse_filters((text,))
    return tool.judge(pool)


def reasons(text, texts):
    return judge(text, texts).reason_N.tolist()


def test_gopher_quality_by_hand():
    good = SENTENCE * 4  # 19 words each: 76, mean length 71 / 19 = 3.7
    assert reasons(
        "gopher_quality",
        [
            good,
            SENTENCE,  # 19 words, wanted 50
            "Harbour boats lay tied against walls. " * 10,  # no stop word
            "\n".join(f"- {SENTENCE}" for _ in range(5)),  # every line a bullet
            "\n".join(["The boats of the harbour were tied to ..."] * 9),  # ends in an ellipsis
            "the of " + "12 34 56 " * 20,  # 2 of 62 words have letters
            "a to be of " * 15,  # mean length 1.75
            "the of and to internationalisation characterisation " + "misunderstanding " * 60,
        ],
    ) == [
        "",
        "gopher_short_doc",
        "gopher_enough_stop_words",
        "gopher_too_many_bullets",
        "gopher_too_many_end_ellipsis",
        "gopher_below_avg_threshold",
        "gopher_below_avg_threshold",
        "gopher_above_avg_threshold",
    ]


def test_gopher_thresholds_are_the_domains():
    """17 French words: too short for an unknown domain, and in English without a stop word."""
    text = (
        "Le port de la ville est fermé et les bateaux sont au quai depuis le matin de dimanche. "
        * 2
    )
    assert reasons("gopher_quality", [text]) == ["gopher_short_doc"]
    given = [
        Document(
            "wiki_fr",
            next(f"{i}" for i in range(99) if split_of("wiki_fr", f"{i}") == "train"),
            text,
        )
    ]
    (tool,) = parse_filters(("gopher_quality",))
    assert tool.judge(Pool(Source(given), (), None)).kept_N.tolist() == [True]
    assert reasons("gopher_quality min_words=20", [text]) == ["gopher_enough_stop_words"]
    assert reasons("gopher_quality min_words=20 language=fr", [text]) == [""]


def test_rules_leave_code_alone_and_give_it_no_score():
    (tool,) = parse_filters(("gopher_quality",))
    name = next(f"{i}" for i in range(99) if split_of("code", f"{i}") == "train")
    found = tool.judge(Pool(Source([Document("code", name, "x = 1")]), (), None))
    assert found.kept_N.tolist() == [True] and np.isnan(found.score_N).all()


def test_gopher_repetition_by_hand():
    words = " ".join(f"word{i} and" for i in range(60))
    assert reasons(
        "gopher_repetition",
        [
            words,
            "\n".join(["one line", "one line", "another", "a third one"] * 3),  # 8 of 12 lines
            "boats lie here " * 2
            + " ".join(f"w{i}" for i in range(9)),  # "boats lie" 2 * 9 of 57 chars
        ],
    ) == ["", "dup_line_frac", "top_2_gram"]
    assert reasons(
        "gopher_repetition scale=4", ["boats lie here " * 2 + "w1 w2 w3 w4 w5 w6 w7 w8"]
    ) == [""]


def test_c4_by_hand():
    found = judge(
        "c4",
        [
            SENTENCE * 5,
            SENTENCE * 4,  # four sentences, wanted five
            SENTENCE * 5 + "\nfunction() { return; }.",  # a curly bracket
            SENTENCE * 5 + "\nHome | About\nRead more",  # lines without a full stop
            SENTENCE * 5 + "\nLorem ipsum dolor sit amet.",
        ],
    )
    assert found.reason_N.tolist() == ["", "too_few_sentences", "curly_bracket", "", "lorem_ipsum"]
    kept = len(SENTENCE * 5) - 1  # a line is stripped
    assert found.score_N[0] == pytest.approx(kept / len(SENTENCE * 5))
    assert found.score_N[3] == pytest.approx(kept / len(SENTENCE * 5 + "\nHome | About\nRead more"))
    assert reasons("c4 min_sentences=4", [SENTENCE * 4]) == [""]


def test_fineweb_by_hand_with_the_papers_share_of_repeated_characters():
    line = SENTENCE.strip()
    lines = [f"{line[:-1]} {i}." for i in range(40)]
    some = "\n".join([*lines, lines[0], lines[1]])  # 2 of 42 lines: 5 % of the characters
    assert reasons(
        "fineweb",
        [
            "\n".join(lines),
            "\n".join(one[:-1] for one in lines),  # no line ends like a sentence
            "\n".join(["Short.", "Lines.", line, "Are.", "Here.", "Now.", "Too."]),
            "\n".join([line] * 5),
            some,
        ],
    ) == ["", "line_punct_ratio", "short_line_ratio", "char_dup_ratio", ""]
    assert reasons("fineweb duplicate_ratio=0.01", [some]) == [
        "char_dup_ratio"
    ]  # datatrove's default


def test_runs_of_words_are_what_their_formula_says():
    words = [f"w{i}" for i in range(300)]
    found = shingles.hashes(" ".join(words), 50)
    assert len(np.unique(found)) == len(found) == 251

    def direct(run):
        value = (
            sum(shingles._word_hash(w) * pow(shingles.BASE, j, 2**64) for j, w in enumerate(run))
            % 2**64
        )
        value ^= value >> 32
        return (value * 0xD6E8FEB86659FD93 % 2**64) ^ (value >> 29)

    assert [direct(words[i : i + 50]) for i in range(251)] == found.tolist()
    assert shingles.hashes("A b, C", 9).tolist() == shingles.hashes("a B c", 3).tolist()
    assert len(shingles.hashes(" ... ", 5)) == 0


def test_exact_keeps_the_first_of_each():
    texts = ["One two.", "three", "one  TWO.\n", "three", "One two!"]
    assert judge("exact", texts).kept_N.tolist() == [True, True, False, False, True]
    assert judge("exact normalise=false", texts).kept_N.tolist() == [True, True, True, False, True]


def test_substring_counts_the_words_that_were_there_before():
    a, b = ([f"{letter}{i}" for i in range(30)] for letter in "ab")
    # The third has 10 words of the first (runs of 5: 6 of them, which cover 10 words) and 30 of its own.
    texts = [
        " ".join(a),
        " ".join(b),
        " ".join([*a[5:15], *(f"c{i}" for i in range(30))]),
        " ".join(a[:20]),
    ]
    found = judge("substring length=5", texts)
    np.testing.assert_allclose(found.score_N, [1, 1, 0.75, 0], rtol=1e-6)
    assert found.kept_N.tolist() == [True, True, True, False]
    assert judge("substring length=5 max_share=0.2", texts).kept_N.tolist() == [
        True,
        True,
        False,
        False,
    ]
    # Within a document too: "x y z" three times is 9 words, of which the first three are new.
    found = judge("substring length=3 max_share=0.6", ["x y z x y z x y z"])
    np.testing.assert_allclose(found.score_N, [3 / 9], rtol=1e-6)
    assert substring._covered(np.array([False, True, False]), 2) == 0.5  # words 1 and 2 of 4


def test_minhash_estimates_jaccard_and_keeps_who_came_first():
    words = [f"w{i}" for i in range(400)]
    # Of 396 runs of five words, changing word 100 changes five: 391 / (396 + 5) = 0.975.
    close = [*words[:100], "other", *words[101:]]
    found = judge(
        "minhash", [" ".join(words), " ".join(close), " ".join(words[:200]), " ".join(words)]
    )
    assert found.kept_N.tolist() == [True, False, True, False]
    assert found.score_N[1] == pytest.approx(1 - 391 / 401, abs=0.05)
    assert found.score_N[3] == 0
    # Jaccard 196 / 396 = 0.49: below 0.7, above 0.3. Two bands of one row see almost any pair.
    half = judge("minhash threshold=0.3 bands=56 rows=2", [" ".join(words), " ".join(words[:200])])
    assert half.kept_N.tolist() == [True, False]
    assert half.score_N[1] == pytest.approx(1 - 196 / 396, abs=0.15)
    assert np.isnan(judge("minhash", ["..."]).score_N[0])  # no words, nothing to compare


def test_minhash_compares_with_what_stays():
    """The third is like the second, which goes, and less like the first: it stays."""
    first = [f"w{i}" for i in range(400)]
    second = [f"x{i}" if i in (50, 100, 150, 200) else word for i, word in enumerate(first)]
    third = [f"y{i}" if i in (70, 120, 170, 220) else word for i, word in enumerate(second)]
    # Each change touches five runs: 376 / 416 = 0.904 between neighbours, 356 / 436 = 0.817 between first and third.
    texts = [" ".join(words) for words in (first, second, third)]
    assert judge("minhash threshold=0.86 bands=64", texts).kept_N.tolist() == [True, False, True]


def test_minhash_candidates_share_a_band():
    index, signatures = {}, []
    first = np.arange(8, dtype=np.uint32)
    minhash._remember(first, index, signatures, 4)
    half = first.copy()
    half[[1, 3, 5]] += 100  # bands 0, 1, 2 differ; band 3 agrees
    assert minhash._likest(half, index, signatures, 4) == 5 / 8
    none = first.copy()
    none[[1, 3, 5, 7]] += 100  # no band agrees, though half of the places do
    assert minhash._likest(none, index, signatures, 4) == 0


def test_ranking_keeps_the_best_bytes_of_each_domain():
    score = np.array([1, 2, 3, np.nan, 5, 4], np.float32)
    size = np.array([10, 10, 20, 99, 10, 10])
    domain = np.array(["a", "a", "a", "a", "b", "b"], object)
    best = lambda keep: ranking.best(score, size, domain, keep).tolist()  # noqa: E731
    assert best(0.5) == [False, False, True, True, True, False]  # 20 of 40 bytes; 10 of 20
    assert best(0.51) == [False, True, True, True, True, True]
    assert best(1.0) == [True] * 6
    assert best(0.0) == [False, False, False, True, False, False]


def test_samples_are_bounded_and_do_not_depend_on_the_order():
    given = [Document("d", str(i), f"{i:03} " * 5) for i in range(300)]
    first = ranking.sample(given, 400, 0, folds=True)
    assert first == ranking.sample(given[::-1], 400, 0, folds=True)
    assert set(first) == {("d", 0), ("d", 1)}
    assert all(400 <= sum(map(len, texts)) < 420 for texts in first.values())
    assert first != ranking.sample(given, 400, 1, folds=True)


def _language(seed, count):
    """Sentences of a toy language in which order matters: each word has few followers."""
    generator = np.random.default_rng(seed)
    follow = np.random.default_rng(9).integers(0, 80, (80, 2))
    texts = []
    for _ in range(count):
        word, words = int(generator.integers(80)), []
        for _ in range(120):
            words.append(f"{word:02}")
            word = int(follow[word, generator.integers(2)])
        texts.append(" ".join(words))
    return texts


def _judged(kind, dirt, count=400):
    given = [Document("d", str(i), text) for i, text in enumerate(_language(0, count))]
    pool = Pool(Source(given), parse_injectors((dirt,)), tokenizer.Bytes())
    table, (outcome,) = chain.score(pool, parse_filters((kind,)))
    return table, outcome


@pytest.mark.parametrize("kind", LEARNING)
def test_what_learns_finds_what_clean_text_has_not(kind):
    dirt = "random_strings" if kind == "perplexity_ngram" else "boilerplate"
    _, outcome = _judged(f"{kind} keep=0.7", f"{dirt} share=0.2")
    assert outcome["auc"] > 0.9 and outcome["recall"] > 0.85
    assert 0.69 < outcome["domains"]["d"]["kept_bytes"] / outcome["domains"]["d"]["bytes"] < 0.73


def test_importance_weights_by_hand():
    """What neither side has seen weighs nothing, however much less clean text there is."""
    (tool,) = parse_filters(("dsir buckets=1000 max_ngram=1",))
    clean = dsir._log_share(tool, ["a b"])
    pool = dsir._log_share(tool, ["a c c c " * 50])
    weight = clean - pool
    a, b, c, other = (dsir.buckets(tool, word)[0] for word in ("a", "b", "c", "zz"))
    # p(a) = .9 / 2 + .0001 against .9 / 4 + .0001; c only in the pool: .0001 against .9 * 3 / 4 + .0001.
    assert weight[a] == pytest.approx(np.log(0.4501 / 0.2251))
    assert weight[c] == pytest.approx(np.log(0.0001 / 0.6751)) and weight[b] > 0
    assert weight[other] == pytest.approx(0)


def test_a_bag_of_words_is_blind_for_order_and_perplexity_is_not():
    shuffled = "word_shuffle share=0.3"
    for kind in ("classifier max_ngram=1", "dsir max_ngram=1"):
        assert abs(_judged(kind, shuffled)[1]["auc"] - 0.5) < 0.12, kind
    # A bigram of bytes cannot see past a blank; pieces of two words can.
    assert _judged("dsir max_ngram=2", shuffled)[1]["auc"] > 0.95


@pytest.mark.parametrize("kind", LEARNING)
def test_what_learns_wants_clean_text_of_the_domain(kind):
    with pytest.raises(
        DataError, match=f"{kind} learns from the validation split, which has no document of d"
    ):
        judge(kind, [SENTENCE] * 3)


def test_perplexity_is_bits_per_byte_of_the_other_half():
    table, _ = _judged("perplexity_ngram learn_from=pool", "random_strings share=0.1 rate=1")
    clean = -table.score_FN[0][table.kind_N == 0]
    # A word of three bytes has one bit, its follower; a bigram of bytes does not know the word before, only its
    # last byte: at most the log2(10) bits of a digit for each of two bytes, and a blank that is certain.
    assert 1 / 3 < np.median(clean) < 2 * np.log2(10) / 3 + 0.3
    # The pool has few letters: each costs more than the log2(26) = 4.7 bits of a fair draw.
    assert np.median(-table.score_FN[0][table.kind_N == 1]) > 4


def test_what_order_is_worth_by_hand():
    """Of two documents with the same letters, one in the order that was learnt: ab ab ab. Byte pairs, V = 257."""
    from moelab.data.quality.filters import perplexity_ngram

    (tool,) = parse_filters(("perplexity_ngram against=unigram",))
    made = tokenizer.Bytes()
    model = perplexity_ngram._fit(made, ["ababababab"])
    given = [Document("d", str(i), text) for i, text in enumerate(("abab", "bbaa"))]
    score = perplexity_ngram._scores(tool, ("byte", made.text), {("d", 0): model}, given)
    end, a, b = 256, ord("a"), ord("b")
    # -1 - log2 of: p(a | end), p(b | a), p(a | b), p(b | a) over the unigrams of a, b, a, b.
    p = lambda v, w: float(model.probability(np.array([v]), np.array([w]))[0])  # noqa: E731
    wanted = np.log2([p(end, a), p(a, b), p(b, a), p(a, b)]) - np.log2(
        model.unigram_V[[a, b, a, b]]
    )
    assert score[0] == pytest.approx(wanted.mean(), rel=1e-5)
    assert score[0] > 0 > score[1]


def test_no_filter_sees_the_label():
    """Judging is a function of texts, domains and ids: the same text under another label gets the same score."""
    given = [Document("d", str(i), text) for i, text in enumerate(_language(0, 120))]
    spoilt = list(
        Pool(Source(given), parse_injectors(("random_strings share=0.3",)), None).training()
    )
    rest = [one for one in given if split_of("d", one.id) != "train"]
    relabelled = Source([one.document for one in spoilt] + rest)
    for kind in filters.KINDS:
        if kind == "perplexity":
            continue  # wants a run; see quality_perplexity_test.py
        (tool,) = parse_filters((kind,))
        labelled = Pool(
            Source(given), parse_injectors(("random_strings share=0.3",)), tokenizer.Bytes()
        )
        plain = Pool(relabelled, (), tokenizer.Bytes())
        a, b = tool.judge(labelled), tool.judge(plain)
        np.testing.assert_array_equal(a.score_N, b.score_N)
        np.testing.assert_array_equal(a.kept_N, b.kept_N)


def test_truth_by_hand():
    texts = ["same text"] * 3 + ["own text"]
    given = [Document("d", train_id(f"{i}-"), text) for i, text in enumerate(texts)]
    table, _ = chain.score(Pool(Source(given), (), None), parse_filters(("exact",)))
    # Removed are documents 1 and 2; suppose that only 2 is dirty.
    table = dataclasses.replace(table, kinds=(CLEAN, "noise"), kind_N=np.array([0, 0, 1, 0]))
    found = truth.outcome(table, 0)
    assert found["removed"] == 2 and found["precision"] == 1 / 2 and found["recall"] == 1
    assert found["clean_removed"] == round(1 / 3, 6)
    # The dirty one scores 0, the clean ones 1, 0, 1: below, equal, below.
    assert found["auc"] == round(2.5 / 3, 4)
    assert found["kinds"]["noise"] == {"documents": 1, "removed": 1, "auc": round(2.5 / 3, 4)}
    assert found["domains"]["d"] == {"documents": 4, "kept": 2, "bytes": 35, "kept_bytes": 17}
    assert found["reasons"] == {"duplicate": 2}


def test_truth_of_a_chain_by_hand():
    """Of six documents, two domains, three dirty: the first filter takes 1 and 2, the second one 4."""
    names = ("clean", "noise", "copy")
    table = Table(
        domains=("a", "b"),
        kinds=names,
        filters=("first", "second"),
        reasons=("",),
        ids=tuple("012345"),
        sources=("",) * 6,
        domain_N=np.array([0, 0, 0, 1, 1, 1]),
        kind_N=np.array([0, 0, 1, 0, 2, 2]),
        strength_N=np.zeros(6, np.float32),
        num_bytes_N=np.array([1, 2, 4, 8, 16, 32]),
        removed_by_N=np.array([-1, 0, 0, -1, 1, -1]),
        reason_N=np.zeros(6, np.int32),
        score_FN=np.zeros((2, 6), np.float32),
    )
    found = truth.of_all(truth.labels(table, np.ones(6, bool)), truth.labels(table, table.kept_N))
    assert found["filter"] == "all" and found["auc"] is None
    assert (found["documents"], found["removed"]) == (6, 3)
    assert (found["bytes"], found["removed_bytes"]) == (63, 2 + 4 + 16)
    # Removed are a clean document and two of the three dirty ones; document 5 is left.
    assert found["precision"] == found["recall"] == round(2 / 3, 6)
    assert found["clean_removed"] == round(1 / 3, 6)
    assert {kind: row["removed"] for kind, row in found["kinds"].items()} == {
        "clean": 1,
        "noise": 1,
        "copy": 1,
    }
    assert found["domains"] == {
        "a": {"documents": 3, "kept": 1, "bytes": 7, "kept_bytes": 1},
        "b": {"documents": 3, "kept": 2, "bytes": 56, "kept_bytes": 40},
    }
    # What reached the second one had two dirty documents left, of which it took one: that is not the chain's recall.
    assert truth.outcome(table, 1)["recall"] == 1 / 2


def test_truth_of_a_chain_where_all_is_dirty():
    before = {"d": {"noise": {"documents": 2, "bytes": 9}}}
    found = truth.of_all(before, before)
    assert found["kinds"]["clean"] == {"documents": 0, "removed": 0, "auc": None}
    assert (found["precision"], found["recall"], found["clean_removed"]) == (None, 0.0, None)


def test_filters_follow_one_another_and_score_alone_does_not():
    texts = [SENTENCE * 4, SENTENCE * 4, "short", "short"]
    given = [Document("d", train_id(f"{i}-"), text) for i, text in enumerate(texts)]
    tools = parse_filters(("exact", "gopher_quality"))
    table, outcomes = chain.run(Pool(Source(given), (), None), tools)
    assert table.removed_by_N.tolist() == [-1, 0, 1, 0]
    assert [table.reasons[r] for r in table.reason_N] == [
        "",
        "duplicate",
        "gopher_short_doc",
        "duplicate",
    ]
    assert [one["documents"] for one in outcomes] == [4, 2]
    np.testing.assert_array_equal(np.isnan(table.score_FN[1]), [False, True, False, True])
    table, outcomes = chain.score(Pool(Source(given), (), None), tools)
    assert [one["removed"] for one in outcomes] == [2, 2] and not np.isnan(table.score_FN).any()


def test_an_empty_result_is_refused_by_name():
    given = [Document(d, str(i), f"text {i}") for d in ("one", "two") for i in range(30)]
    with pytest.raises(
        DataError,
        match=r"'gopher_quality domains=two' leaves no training document of two \(of \d+\)",
    ):
        chain.run(
            Pool(Source(given), (), None), parse_filters(("exact", "gopher_quality domains=two"))
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minhsh", r"data.filter: no filter 'minhsh'; did you mean minhash\?"),
        ("minhash threshold=1.1", "minhash: threshold must be between 0 and 1, got 1.1"),
        ("minhash bands=0", "minhash: bands must be at least 1, got 0"),
        ("minhash bands=2.5", "minhash: bands wants int, got '2.5'"),
        ("classifier keep=-1", "classifier: keep must be between 0 and 1, got -1"),
        ("minhash seed=-1", "minhash: seed must be at least 0, got -1"),
        ("minhash seed=99999999999999999999", "minhash: seed must be at most 4294967295, got 9999"),
        ("classifier seed=4294967296", "seed must be at most 4294967295, got 4294967296"),
        ("gopher_quality min_words=-5", "gopher_quality: min_words must be at least 0, got -5"),
        ("gopher_quality min_word_length=-2.5", "min_word_length must be at least 0, got -2.5"),
        ("perplexity run=x tokens=-1", "perplexity: tokens must be at least 0, got -1"),
        ("classifier keeep=1", "no field 'keeep'; did you mean keep"),
        ("gopher_quality language=xx", "language must be one of en, fr, es, de, got 'xx'"),
        ("gopher_repetition scale=0", "scale must be above 0, got 0"),
        ("perplexity_ngram against=all", "against must be nothing or unigram, got 'all'"),
        ("perplexity_ngram learn_from=test", "learn_from must be pool or validation, got 'test'"),
    ],
)
def test_bad_words_are_refused_with_what_was_meant(text, message):
    with pytest.raises(DataError, match=message):
        parse_filters((text,))


@pytest.mark.parametrize("where", ["filter", "inject"])
def test_no_number_of_any_tool_is_negative_or_endless(where):
    folder, name, parse = (
        (filters, "Filter", parse_filters)
        if where == "filter"
        else (inject, "Injector", parse_injectors)
    )
    for kind in folder.KINDS:
        for field in dataclasses.fields(getattr(folder.module(kind), name)):
            if type(field.default) in (int, float):
                with pytest.raises(DataError, match=f"{kind}: {field.name} must be .* got -1"):
                    parse((f"{kind} {field.name}=-1",))
            if type(field.default) is int:
                with pytest.raises(DataError, match=f"{kind}: {field.name} must be at most"):
                    parse((f"{kind} {field.name}={10**30}",))


def test_a_filter_is_written_as_it_is_read():
    text = "minhash domains=code+verse threshold=0.8"
    assert spec.written(parse_filters((text,))[0]) == text
