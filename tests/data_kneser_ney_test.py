"""moelab/data/kneser_ney.py: a worked example, probabilities that sum to one, the model's accounting."""

import math

import numpy as np
import pytest

from moelab import data, schema
from moelab.data import DataError, kneser_ney


def test_worked_example():
    # Pairs over V = 3: (0,1) x2, (0,2) x1, (1,0) x1.
    # Counts of counts: m1 = 2, m2 = 1, m3 = m4 = 0; Y = 2 / (2 + 2*1) = 1/2.
    #   D1 = 1 - 2 * 1/2 * m2/m1 = 1 - 1/2 = 1/2;   D2 = 2 - 3 * 1/2 * m3/m2 = 2, not below 2 -> i/2 = 1.
    # Contexts per token: n = (1, 1, 1), all from different pairs; n. = 3.
    #   m1 = 3, m2 = 0: no estimate, E1 = 1/2;  q(w) = (1 - 1/2)/3 + (3 * 1/2 / 3)/3 = 1/6 + 1/6 = 1/3.
    # p(1|0) = (2 - 1)/3 + g(0) q,  g(0) = (1 + 1/2)/3 = 1/2  ->  1/3 + 1/6 = 1/2
    # p(2|0) = (1 - 1/2)/3 + 1/6 = 1/3;   p(0|0) = 1/6
    # p(0|1) = (1 - 1/2)/1 + 1/2 * 1/3 = 2/3;  p(1|1) = 1/6
    # p(.|2): never seen as a context, g = 1  ->  1/3
    context, token = np.array([0, 0, 0, 1]), np.array([1, 1, 2, 0])
    model = kneser_ney.fit(context, token, 3)
    everything = model.probability(np.repeat([0, 1, 2], 3), np.tile([0, 1, 2], 3)).reshape(3, 3)
    np.testing.assert_allclose(
        everything,
        [[1 / 6, 1 / 2, 1 / 3], [2 / 3, 1 / 6, 1 / 6], [1 / 3, 1 / 3, 1 / 3]],
        rtol=1e-12,
    )


def test_discounts_by_hand():
    # m1 = 8, m2 = 4, m3 = 2, m4 = 1: Y = 8 / (8 + 2*4) = 1/2.
    # D1 = 1 - 2 Y 4/8 = 1/2; D2 = 2 - 3 Y 2/4 = 5/4; D3+ = 3 - 4 Y 1/2 = 2.
    count = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] + [9] * 3)
    np.testing.assert_allclose(kneser_ney.discounts(count), [0, 0.5, 1.25, 2.0])
    # Nothing to estimate from: half of the count.
    np.testing.assert_allclose(kneser_ney.discounts(np.array([5, 5])), [0, 0.5, 1.0, 1.5])


@pytest.mark.parametrize("num_pairs", [1, 30, 3000])
def test_probabilities_sum_to_one(num_pairs):
    generator = np.random.default_rng(num_pairs)
    size = 40
    context, token = (generator.zipf(1.5, num_pairs) % size for _ in range(2))
    model = kneser_ney.fit(context, token, size)
    everything = model.probability(np.repeat(np.arange(size), size), np.tile(np.arange(size), size))
    assert (everything > 0).all()
    np.testing.assert_allclose(everything.reshape(size, size).sum(axis=1), 1, rtol=1e-12)


def test_continuation_counts_not_frequency():
    # Token 1 is frequent but follows only 0 ("Francisco" after "San"); 2 follows four contexts.
    context = np.array([0] * 50 + [3, 4, 5, 6])
    token = np.array([1] * 50 + [2] * 4)
    model = kneser_ney.fit(context, token, 8)
    assert model.unigram_V[2] > 2 * model.unigram_V[1]


def test_nothing_to_fit():
    with pytest.raises(DataError, match="at least one pair"):
        kneser_ney.fit(np.zeros(0, int), np.zeros(0, int), 4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("kneser_ney")
    for domain in ("é", "plain"):
        (root / "texts" / domain).mkdir(parents=True)
        for i in range(120):
            (root / "texts" / domain / f"{i}.txt").write_text(f"{domain} number {i} " * 4)
    return data.build(schema.TextFolder(path=str(root / "texts")), schema.Byte(), cache=root)


def test_accounting_is_the_models(dataset):
    """Bits of every chosen document's tokens, ends included, over the UTF-8 bytes of its text."""
    train = data.train_batches(dataset, batch_size=8, length=16, seed=0)
    evaluation = data.evaluation_batches(
        dataset, "test", batch_size=4, length=16, tokens_per_domain=200
    )
    seen = [train[step] for step in range(20)]
    found = kneser_ney.bits_per_byte(dataset, iter(seen), evaluation)
    assert set(found) == {"é", "plain", "all"}
    windows = np.concatenate([np.c_[batch.token_BL, batch.target_BL[:, -1]] for batch in seen])
    windows = np.unique(windows, axis=0)
    model = kneser_ney.fit(windows[:, :-1].ravel(), windows[:, 1:].ravel(), 257)
    split, nats, num_bytes = dataset.split("test"), {}, {}
    for domain, name in enumerate(dataset.domains):
        stream = [256]
        for index in evaluation.document_D[domain]:
            stream += split.document(index).tolist()
        p = model.probability(np.array(stream[:-1]), np.array(stream[1:]))
        texts = [dataset.tokenizer.decode(split.document(i)) for i in evaluation.document_D[domain]]
        nats[name] = -sum(map(math.log, p))
        num_bytes[name] = sum(len(text.encode()) for text in texts)
        assert found[name] == pytest.approx(nats[name] / math.log(2) / num_bytes[name], rel=1e-9)
    total = sum(nats.values()) / math.log(2) / sum(num_bytes.values())
    assert found["all"] == pytest.approx(total, rel=1e-9)
    # A list of batches, and the same windows seen twice or given as an array, change nothing.
    assert kneser_ney.bits_per_byte(dataset, seen + seen, list(evaluation)) == found
    assert kneser_ney.bits_per_byte(dataset, windows, evaluation) == found
