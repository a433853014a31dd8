"""moelab/data/quality/inject: what each does to a document, to which ones, and always the same."""

import collections
import re

import pytest

from moelab.data import DataError
from moelab.data.document import Document
from moelab.data.quality import inject, parse_injectors
from moelab.data.quality.contract import Label, Labelled
from moelab.data.quality.inject import wheel
from moelab.data.quality.pool import Pool
from moelab.data.split import split_of

WORDS = "The river rose in spring. It fell in summer, and the boats lay still. Nobody came.".split()


class Source:
    """Documents in memory."""

    name, fallback = "memory", False

    def __init__(self, documents):
        self._documents = documents
        self.domains = tuple(dict.fromkeys(document.domain for document in documents))

    def documents(self):
        yield from self._documents


def documents(count=200, domains=("wiki_en",)):
    """Different texts, all with the same words."""
    return [
        Document(domain, str(i), " ".join(WORDS[i % 9 :] + [f"w{i}"] + WORDS[: i % 9]))
        for domain in domains
        for i in range(count)
    ]


def pooled(text, given=None):
    return Pool(Source(given or documents()), parse_injectors((text,)), None)


def made(pool):
    """The training documents by label."""
    found = collections.defaultdict(list)
    for one in pool.training():
        found[one.label.kind].append(one)
    return found


# What changes documents in place, with `share` of them.
IN_PLACE = ["token_noise", "word_shuffle", "random_strings", "markup", "boilerplate"]


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_share_of_the_documents_is_changed_and_the_rest_is_not(kind):
    pool = pooled(f"{kind} share=0.4", documents(600))
    clean = {one.id: one for one in pool.source.documents() if split_of(*one[:2]) == "train"}
    found = made(pool)
    assert len(found["clean"]) + len(found[kind]) == len(clean)
    # 540 documents, binomial: standard deviation sqrt(.4 * .6 / 540) = 0.021
    assert len(found[kind]) / len(clean) == pytest.approx(0.4, abs=0.07)
    assert all(one.document == clean[one.document.id] for one in found["clean"])
    assert all(one.document.text != clean[one.document.id].text for one in found[kind])
    assert all(0 < one.label.strength <= 1 for one in found[kind])


@pytest.mark.parametrize("kind", [kind for kind in inject.KINDS if kind != "wheel"])
def test_the_same_dirt_every_time_and_other_dirt_for_another_seed(kind):
    given = documents(60, ("wiki_en", "wiki_fr"))
    first, second = (list(pooled(f"{kind} share=0.5", given).training()) for _ in range(2))
    assert first == second
    assert list(pooled(f"{kind} share=0.5 seed=1", given).training()) != first
    ids = [(one.document.domain, one.document.id) for one in first]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_document_has_its_dirt_whoever_else_is_there(kind):
    options = " vocabulary=document" if kind == "token_noise" else ""
    alone = {one.document.id: one for one in pooled(f"{kind}{options}", documents(100)).training()}
    among = {one.document.id: one for one in pooled(f"{kind}{options}", documents(200)).training()}
    assert all(among[name] == one for name, one in alone.items())


@pytest.mark.parametrize("kind", [kind for kind in inject.KINDS if kind != "wheel"])
def test_only_the_training_split_is_touched(kind):
    given = documents(300, ("wiki_en", "wiki_fr"))
    pool = pooled(f"{kind} share=0.9", given)
    rest = [one for one in given if split_of(one.domain, one.id) != "train"]
    came = [(one, split) for one, split in pool.everything([True] * len(list(pool.training())))]
    assert [one for one, split in came if split != "train"] == rest and rest
    evaluated = {(one.domain, one.id) for one in rest}
    assert not evaluated & {(one.domain, one.id) for one, split in came if split == "train"}


@pytest.mark.parametrize("kind", [kind for kind in inject.KINDS if kind != "wheel"])
def test_domains_restrict(kind):
    given = documents(100, ("wiki_en", "wiki_fr"))
    found = made(pooled(f"{kind} share=0.5 domains=wiki_fr", given))
    (dirty,) = (kinds for kinds in found if kinds != "clean")
    came_from = {
        one.label.source.partition("/")[0] if kind == "wrong_language" else one.document.domain
        for one in found[dirty]
    }
    assert came_from == {"wiki_fr"}


def test_token_noise_replaces_the_share_by_words_of_the_domain():
    text = " ".join(f"a{i % 10}" for i in range(4000))
    given = [Document("d", "noisy", text), Document("d", "other", "b " * 1000)]
    pool = pooled("token_noise share=1 rate=0.25", given)
    one = next(one for one in pool.training() if one.document.id == "noisy")
    changed = [
        new for old, new in zip(text.split(), one.document.text.split(), strict=True) if old != new
    ]
    # A fifth of the domain's words are b; of the drawn a's one in ten is what was there before:
    # 4000 * .25 * (.2 + .8 * .9) = 920, standard deviation about 27.
    assert len(changed) == pytest.approx(920, abs=110)
    assert changed.count("b") == pytest.approx(200, abs=55)
    assert one.label == Label("token_noise", 0.25)


def test_token_noise_keeps_blanks_and_may_draw_from_the_document():
    given = [Document("d", "one", "x  y\n\nz\tx y z " * 40), Document("d", "other", "b " * 1000)]
    pool = pooled("token_noise share=1 rate=1 vocabulary=document", given)
    text = next(one.document.text for one in pool.training() if one.document.id == "one")
    assert re.findall(r"\s+", text) == re.findall(r"\s+", given[0].text)
    assert set(text.split()) == {"x", "y", "z"}


def test_word_shuffle_keeps_every_word_and_blank():
    given = [Document("d", "one", "a b\nc d\n\ne f g h")]
    (one,) = pooled("word_shuffle share=1", given).training()
    assert sorted(one.document.text.split()) == list("abcdefgh")
    assert re.findall(r"\s+", one.document.text) == [" ", "\n", " ", "\n\n", " ", " ", " "]
    (near,) = pooled("word_shuffle share=1 span=2", given).training()
    pairs = near.document.text.split()
    assert [set(pairs[i : i + 2]) for i in (0, 2, 4, 6)] == [
        set("ab"),
        set("cd"),
        set("ef"),
        set("gh"),
    ]


@pytest.mark.parametrize(
    ("share", "copies", "chosen"),
    [
        # 100 documents of 10 bytes, s = 0.2, R = 5: b = .2 * 1000 / (5 * .8 + .2) = 47.6, so 4 documents. They are then
        # 5 * 40 of 960 + 200 bytes, 17 %; five would be 20.8 %.
        (0.2, 5, 4),
        (0.5, 2, 33),  # .5 * 1000 / (2 * .5 + .5) = 333: 2 * 330 of 670 + 660 bytes, 49.6 %
    ],
)
def test_duplicate_meets_its_share(share, copies, chosen):
    train = (i for i in range(1000) if split_of("d", f"{i:03}") == "train")
    given = [
        Document("d", f"{i:03}", f"text   {i:03}") for _, i in zip(range(100), train, strict=False)
    ]
    found = made(pooled(f"duplicate share={share} copies={copies}", given))
    assert len(found["clean"]) == 100 and len(found["duplicate"]) == chosen * (copies - 1)
    groups = collections.Counter(one.label.source for one in found["duplicate"])
    assert set(groups.values()) == {copies - 1}
    texts = {one.document.id: one.document.text for one in found["clean"]}
    assert all(one.document.text == texts[one.label.source] for one in found["duplicate"])


def test_duplicate_grows_the_text_as_it_says():
    """All documents, a hundred times; half of the text of few documents, as often as you like: twice as long."""
    given = [Document("d", f"{i:03}", f"text   {i:03}") for i in range(30)]
    clean = [one for one in given if split_of("d", one.id) == "train"]
    found = made(pooled("duplicate share=1 copies=100", given))
    assert len(found["duplicate"]) == 99 * len(clean) and len(found["clean"]) == len(clean)
    parse_injectors(("duplicate share=0.5 copies=1000000",))


def test_near_duplicate_misses_words_and_names_its_original():
    found = made(pooled("near_duplicate share=1 rate=0.3", documents(300)))
    texts = {one.document.id: one.document.text.split() for one in found["clean"]}
    assert len(found["near_duplicate"]) == len(texts)
    missing = sum(
        len(texts[one.label.source]) - len(one.document.text.split())
        for one in found["near_duplicate"]
    )
    assert missing / sum(map(len, texts.values())) == pytest.approx(0.3, abs=0.03)


def test_boilerplate_is_in_the_language_of_the_domain():
    found = made(pooled("boilerplate share=1 lines=4", documents(30, ("wiki_fr",))))
    text = found["boilerplate"][0].document.text
    lines = text.split("\n")
    from moelab.data.quality.inject import boilerplate

    assert len(lines) == 5 and set(lines[:2] + lines[3:]) <= set(boilerplate.LINES["fr"])
    strength = found["boilerplate"][0].label.strength
    assert strength == pytest.approx(1 - len(lines[2]) / len(text))


def test_markup_strength_is_its_share_of_the_characters():
    given = [Document("d", "one", "One. Two.\nThree.")]
    (one,) = pooled("markup share=1", given).training()
    text = re.sub(r"<[^>]*>|&\w+;", "", one.document.text)
    assert text == "One.Two.Three."
    assert one.label.strength == pytest.approx(1 - 16 / len(one.document.text))


def test_wrong_language_moves_and_copies_nothing():
    given = documents(200, ("wiki_en", "wiki_fr", "code"))
    found = made(pooled("wrong_language share=0.2", given))
    total = sum(split_of(one.domain, one.id) == "train" for one in given)
    assert len(found["clean"]) + len(found["wrong_language"]) == total
    for one in found["wrong_language"]:
        domain, _, name = one.label.source.partition("/")
        assert {domain, one.document.domain} == {"wiki_en", "wiki_fr"}
        assert one.document.text in {d.text for d in given if (d.domain, d.id) == (domain, name)}
    with pytest.raises(DataError, match=r"two languages; the data has wiki_en \(en\), code"):
        pooled("wrong_language", documents(10, ("wiki_en", "code")))


def test_injectors_follow_one_another_and_spoil_a_document_once():
    pool = Pool(
        Source(documents(400)),
        parse_injectors(
            ("token_noise share=0.5", "markup share=0.5", "duplicate share=0.3 copies=3")
        ),
        None,
    )
    found = made(pool)
    total = sum(split_of(one.domain, one.id) == "train" for one in pool.source.documents())
    assert len(found["token_noise"]) + len(found["markup"]) + len(found["clean"]) == total
    assert len(found["markup"]) == pytest.approx((total - len(found["token_noise"])) / 2, abs=35)
    assert not any("<p" in one.document.text for one in found["token_noise"])
    originals = {one.label.source for one in found["duplicate"]}
    assert originals <= {one.document.id for one in found["clean"]}


def test_an_empty_document_is_nobodys():
    given = [*documents(20), Document("wiki_en", "empty", "")]
    pool = pooled("token_noise share=1", given)
    assert "empty" not in [one.document.id for one in pool.training()]
    everything = list(pool.everything([True] * len(list(pool.training()))))
    assert [one.id for one, _ in everything if not one.text] == ["empty"]  # counted by the writer


@pytest.mark.parametrize("source", wheel.DOMAIN)
def test_wheels_have_nothing_of_an_evaluation_split(source):
    from moelab.data import corpus

    if not isinstance(corpus.open_corpus(("verse",)), corpus.PinnedCorpus):
        pytest.skip("the corpus is not installed")
    found = wheel.documents(source)
    assert len(found) > 500 and len({one.id for one in found}) == len(found)
    for one in found:
        if source == "sympy_tests":
            clean = one.id.replace("/tests/test_", "/")
            assert split_of("code", clean) == "train"
        else:
            assert split_of("verse", f"kjv/{one.id.partition('/')[2]}") == "train"


def test_wheel_meets_its_share_and_refuses_more_than_there_is():
    from moelab.data import corpus

    source = corpus.open_corpus(("verse",))
    if not isinstance(source, corpus.PinnedCorpus):
        pytest.skip("the corpus is not installed")
    found = made(Pool(source, parse_injectors(("wheel source=html_bible share=0.25",)), None))
    size = {
        kind: sum(len(one.document.text.encode()) for one in ones) for kind, ones in found.items()
    }
    assert size["wheel"] / (size["wheel"] + size["clean"]) == pytest.approx(0.25, abs=0.001)
    assert "<sup>" in found["wheel"][0].document.text
    assert {one.label.source for one in found["wheel"]} == {"html_bible"}
    with pytest.raises(DataError, match=r"at most share=0\.53, got 0\.9"):
        Pool(source, parse_injectors(("wheel share=0.9",)), None)
    with pytest.raises(
        DataError, match="wants data.kind=corpus with domain code; the data is corpus with verse"
    ):
        Pool(source, parse_injectors(("wheel source=sympy_tests",)), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokn_noise", r"data.inject: no injector 'tokn_noise'; did you mean token_noise\?"),
        ("", "data.inject: no injector ''; there are boilerplate, duplicate"),
        ("token_noise share=1.5", "token_noise: share must be between 0 and 1, got 1.5"),
        ("token_noise share=-0.1", "token_noise: share must be between 0 and 1, got -0.1"),
        ("token_noise share=much", "token_noise: share wants float .a finite number., got 'much'"),
        ("token_noise shrae=0.5", "no field 'shrae'; did you mean share"),
        ("token_noise 0.5", "token_noise: '0.5' is not FIELD=VALUE; it has domains, seed, share"),
        ("token_noise share=0.1 share=0.2", "token_noise: share is given twice"),
        ("token_noise vocabulary=french", "vocabulary must be domain or document, got 'french'"),
        ("duplicate copies=0", "duplicate: copies must be at least 1, got 0"),
        ("duplicate copies=1000000000", "duplicate: copies must be at most 1,000,000, got 1,000,"),
        (
            "duplicate share=1 copies=1000000000",
            "duplicate: copies must be at most 1,000,000, got 1,000,000,000",
        ),
        (
            "duplicate share=1 copies=101",
            "share=1 with copies=101 makes the text 101 times as long, at most 100 times",
        ),
        ("duplicate share=0.9999 copies=1000000", "makes the text 9,901 times as long"),
        ("word_shuffle span=1", "span must be 0 or at least 2, got 1"),
        ("boilerplate lines=99", "lines must be at most 12, got 99"),
        ("wheel source=luther", "source must be one of html_bible, notes_bible"),
        ("wheel domains=code", "html_bible is for domain verse, got code"),
        (
            "near_duplicate,markup",
            "markup behind near_duplicate would spoil what near_duplicate has",
        ),
        ("wheel share=1", "share must be less than 1"),
    ],
)
def test_bad_words_are_refused_with_what_was_meant(text, message):
    with pytest.raises(DataError, match=message):
        parse_injectors(tuple(text.split(",")))


def test_labelled_is_clean_by_default():
    assert Labelled(Document("d", "i", "t")).label == Label("clean", 0.0, "")


def test_what_is_kept_in_memory_changes_nothing(monkeypatch):
    from moelab.data.quality import pool as pools

    texts = ("token_noise share=0.3", "markup share=0.3", "duplicate share=0.2 copies=3")
    make = lambda: Pool(Source(documents(100)), parse_injectors(texts), None)  # noqa: E731
    kept = make()
    first, second = list(kept.training()), list(kept.training())
    assert kept._remembered[0] == 3 and first == second
    next(kept.training())  # a pass that stops early
    assert list(kept.training()) == first
    monkeypatch.setattr(pools, "MEMORY", 100)
    streamed = make()
    assert list(streamed.training()) == first == list(streamed.training())
    assert streamed._remembered is None
