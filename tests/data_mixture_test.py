"""moelab/data/mixture.py: shares that are met, a plan that depends on the draw alone, pools that are nested."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest

from moelab import config, data, schema
from moelab.data import DataError, mixture
from moelab.data.quality import buckets

LENGTH = 16
Mixture = schema.Mixture


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two domains, a fifth of each shuffled, copies of a tenth, and scores."""
    root = tmp_path_factory.mktemp("mixture")
    for domain, size in (("prose", 12), ("code", 4)):
        (root / "texts" / domain).mkdir(parents=True)
        for i in range(200):
            text = f"{domain} {i} " + " ".join(str(i * j % 89) for j in range(size))
            (root / "texts" / domain / f"{i}.txt").write_text(text)
    section = schema.TextFolder(
        path=str(root / "texts"),
        inject=("word_shuffle share=0.2", "duplicate share=0.2 copies=3"),
        filter=("dsir keep=1 domains=prose",),
    )
    return data.build(section, schema.Byte(), cache=root)


def batches(dataset, settings=None, seed=0, num_steps=100, batch_size=8):
    return data.train_batches(
        dataset,
        batch_size=batch_size,
        length=LENGTH,
        seed=seed,
        mixture=settings,
        num_steps=num_steps,
    )


def test_places_by_hand():
    # p = 1/2: floor(n/2) rises behind every odd n. Of the rest (0, 2, 4, 6 -> 0, 1, 2, 3) the same.
    assert [mixture.place(n, (0.5, 0.25, 0.25)) for n in range(8)] == [
        (2, 0), (0, 0), (1, 0), (0, 1), (2, 1), (0, 2), (1, 1), (0, 3),
    ]  # fmt: skip
    assert [mixture.place(n, (0, 1.0, 0))[0] for n in range(3)] == [1, 1, 1]
    assert mixture.drawn(8, (0.5, 0.25, 0.25)) == [4, 2, 2]
    assert mixture.drawn(5, (0.5, 0.25, 0.25)) == [2, 1, 2]


@pytest.mark.parametrize(
    "share", [(0.5, 0.5), (0.9, 0.07, 0.03), (1 / 3, 0, 2 / 3), (0.001, 0.999), (0.1,) * 10]
)
def test_every_stretch_has_the_shares_and_numbers_run_on(share):
    counts = [0] * len(share)
    for draw in range(3000):
        assert mixture.drawn(draw, share) == counts
        stream, number = mixture.place(draw, share)
        assert (
            number == counts[stream]
        )  # the next of its stream: none is left out, none comes twice
        counts[stream] += 1
        assert all(
            abs(count - (draw + 1) * part) < len(share)
            for count, part in zip(counts, share, strict=True)
        )


def test_a_later_phase_goes_on_where_the_streams_were():
    plan = mixture.Plan([(0, (0.75, 0.25)), (10, (0, 1.0))])
    found = [plan(draw) for draw in range(14)]
    for stream in (0, 1):
        numbers = [number for one, number in found if one == stream]
        assert numbers == list(range(len(numbers)))
    assert [stream for stream, _ in found[10:]] == [1] * 4
    assert plan.counts(10) == [7, 3] and plan.counts(14) == [7, 7]


def test_the_default_is_the_order_that_it_always_was(dataset):
    import grain

    from moelab.data.loader import Windows

    windows = Windows(mixture.whole(dataset.split("train")), LENGTH, 8)
    ordered = grain.MapDataset.source(windows).seed(3).shuffle().repeat(None).batch(8)
    for settings in (None, Mixture(), dataclasses.asdict(Mixture())):
        found = batches(dataset, settings, seed=3)
        for step in (0, 1, 77):
            for a, b in zip(found[step], ordered[step], strict=True):
                np.testing.assert_array_equal(a, b)


WEIGHTED = Mixture(
    domain_weights=("code=3", "prose=1"),
    bucket_by="label",
    bucket_weights=("word_shuffle=0.25", "duplicate=2"),
    anneal_share=0.25,
    anneal_bucket_weights=("clean=1", "*=0"),
)


def seen(dataset, found, steps):
    """Counts windows by domain and label, after a check that each window is of one."""
    table, part = dataset.quality, dataset.split("train")
    kind_N = table.kind_N[table.kept_N]
    counts = collections.Counter()
    for step in steps:
        batch = found[step]
        for row in range(len(batch.domain_B)):
            documents = batch.document_BL[row]
            (kind,) = set(kind_N[documents].tolist())
            assert set(part.domain_N[documents].tolist()) == {int(batch.domain_B[row])}
            counts[dataset.domains[int(batch.domain_B[row])], table.kinds[kind]] += 1
    return counts


def test_shares_of_domains_and_labels_are_met_and_the_end_is_clean(dataset):
    found = batches(dataset, WEIGHTED)
    counts = seen(dataset, found, range(75))  # three quarters of 100 steps of 8 windows
    code, prose = (
        sum(n for (d, _), n in counts.items() if d == domain) for domain in ("code", "prose")
    )
    assert abs(code - 450) <= 6 and code + prose == 600
    size = {
        (dataset.domains[one.domain], one.bucket): (len(one.token_T) - 1) // LENGTH
        for one in mixture.streams(dataset, WEIGHTED, 0)[0]
    }
    weight = {"clean": 1, "word_shuffle": 0.25, "duplicate": 2}
    for domain, total in (("code", 450), ("prose", 150)):
        whole = sum(weight[kind] * size[domain, kind] for kind in weight)
        for kind in weight:
            wanted = total * weight[kind] * size[domain, kind] / whole
            assert abs(counts[domain, kind] - wanted) <= 7, (domain, kind)
    end = seen(dataset, found, range(75, 100))
    assert set(end) == {("code", "clean"), ("prose", "clean")}
    assert abs(end["code", "clean"] - 150) <= 2


def test_a_batch_is_a_function_of_seed_and_step(dataset):
    first, second, other = (
        batches(dataset, WEIGHTED),
        batches(dataset, WEIGHTED),
        batches(dataset, WEIGHTED, seed=1),
    )
    for step in (99, 3, 74, 0, 75):  # in any order, as after a restart
        for a, b in zip(first[step], second[step], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert any((first[step].token_BL != other[step].token_BL).any() for step in range(5))
    plain = batches(dataset)[0]
    for a, b in zip(first[0], plain, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


def test_a_stream_comes_wholly_before_it_comes_again(dataset):
    found = batches(dataset, WEIGHTED, num_steps=400)
    rows = collections.defaultdict(list)
    table = dataset.quality
    kind_N = table.kind_N[table.kept_N]
    for step in range(400):
        batch = found[step]
        for row in range(8):
            key = int(batch.domain_B[row]), int(kind_N[batch.document_BL[row, 0]])
            rows[key].append(batch.token_BL[row].tobytes() + batch.document_BL[row].tobytes())
    for one in found.passes(400)["streams"]:
        key = dataset.domains.index(one["domain"]), table.kinds.index(one["bucket"])
        windows, mine = one["unique_tokens"] // LENGTH, rows[key]
        assert one["drawn"] == len(mine) and one["epochs"] == len(mine) / windows
        for start in range(0, len(mine) - windows + 1, windows):
            assert len(set(mine[start : start + windows])) == windows


def test_buckets_of_scores_hold_equal_tokens_of_each_domain(dataset):
    names, bucket_N = buckets.divide(dataset, "dsir", 4)
    part, table = dataset.split("train"), dataset.quality
    assert names == ("unjudged", "q1", "q2", "q3", "q4")
    prose = part.domain_N == dataset.domains.index("prose")
    assert (bucket_N[~prose] == 0).all() and (bucket_N[prose] > 0).all()
    tokens = np.bincount(bucket_N[prose], part.num_tokens_N[prose])[1:]
    assert (abs(tokens / tokens.sum() - 0.25) < 0.02).all()
    score_N = table.score_FN[0][table.kept_N]
    for low, high in itertools.pairwise(range(1, 5)):
        assert score_N[prose & (bucket_N == low)].max() <= score_N[prose & (bucket_N == high)].min()
    best = Mixture(bucket_by="dsir", bucket_weights=("q4=1", "*=0"))
    with pytest.raises(DataError, match="no 'q5'"):
        batches(dataset, dataclasses.replace(best, bucket_weights=("q5=1",)))
    found = batches(dataset, best)
    documents = np.unique([found[step].document_BL for step in range(20)])
    assert set(bucket_N[documents].tolist()) == {4}


def test_pools_are_nested_whole_documents_with_their_copies(dataset):
    part = dataset.split("train")
    total = int(part.num_tokens_N.sum())
    chosen = {
        tokens: mixture.subset(dataset, part, Mixture(unique_tokens=tokens), 0)
        for tokens in (total // 8, total // 4, total // 2)
    }
    for small, large in itertools.pairwise(chosen.values()):
        assert (large[small]).all() and large.sum() > small.sum()
    longest_group = 3 * part.num_tokens_N.max()
    for tokens, chosen_N in chosen.items():
        assert tokens <= part.num_tokens_N[chosen_N].sum() <= tokens + 2 * longest_group
        for domain in (0, 1):  # in proportion
            mine = part.domain_N == domain
            share = part.num_tokens_N[mine & chosen_N].sum() / part.num_tokens_N[chosen_N].sum()
            assert share == pytest.approx(part.num_tokens_N[mine].sum() / total, abs=0.08)
        ids = {part.ids[i] for i in np.flatnonzero(chosen_N)}
        for name in part.ids:
            if "#copy" in name:
                assert (name in ids) == (name.partition("#")[0] in ids)


def test_epochs_make_the_pool_that_the_run_passes_so_often(dataset):
    for epochs in (4, 16):
        found = batches(dataset, Mixture(epochs=epochs), num_steps=40)
        # 40 * 8 * 16 = 5120 tokens; whole documents, and less than a window is lost in each domain.
        came = found.passes(40)["epochs"]
        assert came == pytest.approx(epochs, rel=0.25)
        windows = [
            (row.tobytes(), documents.tobytes())
            for step in range(40)
            for row, documents in zip(found[step].token_BL, found[step].document_BL, strict=True)
        ]
        assert set(collections.Counter(windows).values()) <= {math.floor(came), math.ceil(came)}
    with pytest.raises(
        DataError, match=r"epochs=0.1 wants a pool of 51,200 tokens; the training split has"
    ):
        batches(dataset, Mixture(epochs=0.1), num_steps=40)
    with pytest.raises(DataError, match=r"unique_tokens=1e\+09 wants a pool of 1,000,000,000"):
        batches(dataset, Mixture(unique_tokens=10**9))
    with pytest.raises(DataError, match="want the number of steps"):
        data.train_batches(dataset, batch_size=8, length=16, seed=0, mixture=Mixture(epochs=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(domain_weights=("code=1",)), r"prose has no weight; give each domain one"),
        (dict(domain_weights=("cod=1", "*=1")), r"domain_weights: no 'cod'; did you mean code\?"),
        (
            dict(bucket_by="label", bucket_weights=("noise=1",)),
            "bucket_weights: no 'noise'; there are clean",
        ),
        (dict(bucket_by="label", bucket_weights=("*=0", "clean=0")), "nothing is left to draw"),
        (dict(bucket_by="classifier"), r"no 'classifier'; there are label, dsir"),
        (
            dict(bucket_by="dsir", bucket_weights=("unjudged=0",), domain_weights=("*=1",)),
            "code has a weight, and not one window to draw",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_named(dataset, settings, message):
    settings.setdefault(
        "bucket_weights", ("clean=1",) if settings.get("bucket_by") == "label" else ()
    )
    with pytest.raises(DataError, match=message):
        batches(dataset, Mixture(**settings))


def test_uniform_domains_by_one_word(dataset):
    found = batches(dataset, Mixture(domain_weights=("*=1",)))
    domains = np.concatenate([found[step].domain_B for step in range(50)])
    assert abs((domains == 0).sum() - 200) <= 1


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["mixture.domain_weights=code"], "mixture.domain_weights 'code' is not NAME=WEIGHT"),
        (["mixture.domain_weights=code=-1"], "mixture.domain_weights 'code=-1' is not NAME=WEIGHT"),
        (["mixture.domain_weights=a=1,a=2"], "mixture.domain_weights a is given twice"),
        (["mixture.anneal_share=1.5"], "mixture.anneal_share must be between 0 and 1, got 1.5"),
        (["mixture.anneal_share=0.5"], "mixture.anneal_share wants anneal_domain_weights or"),
        (["mixture.anneal_domain_weights=*=1"], "mixture.anneal_share must be above 0"),
        (["mixture.bucket_weights=clean=1"], "mixture.bucket_weights wants bucket_by"),
        (
            ["mixture.bucket_by=label"],
            "mixture.bucket_by wants data.inject .for label. or a filter",
        ),
        (["mixture.bucket_by=minhsh", "data.filter=minhash"], "did you mean minhash?"),
        (
            ["mixture.unique_tokens=9", "mixture.epochs=2"],
            "mixture.epochs must be 0 where unique_tokens",
        ),
        (["mixture.epochs=-2"], "mixture.epochs must be at least 0, got -2.0"),
    ],
)
def test_configs_are_checked_before_anything_is_built(overrides, problem):
    import re

    problems = config.validate(config.load("experiments/demo.py", overrides).config)
    text = "\n".join(map(str, problems))
    assert problem in text or re.search(problem, text)


def test_a_mixture_counts_in_the_hash_and_its_defaults_do_not():
    plain = config.load("experiments/demo.py").config
    other = config.load("experiments/demo.py", ["mixture.epochs=2"]).config
    assert config.sha256(plain) != config.sha256(other)
    spelt = config.load("experiments/demo.py", ["mixture.epochs=0", "mixture.num_buckets=4"]).config
    assert config.sha256(plain) == config.sha256(spelt)
