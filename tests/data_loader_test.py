"""moelab/data/loader.py: what is predicted, from what, how often, and from which document."""

import collections

import numpy as np
import pytest

from moelab import data, schema
from moelab.data import DataError, loader
from moelab.data.mixture import whole

LENGTH = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("loader")
    for domain, size in (("prose", 5), ("code", 30)):
        (root / "texts" / domain).mkdir(parents=True)
        for i in range(150):
            text = f"{domain} {i} " + "abc def " * (i % size)
            (root / "texts" / domain / f"{i}.txt").write_text(text)
    return data.build(schema.TextFolder(path=str(root / "texts")), schema.Byte(), cache=root)


def test_train_windows_are_cut_from_one_domain(dataset):
    split = dataset.split("train")
    windows = loader.Windows(whole(split), LENGTH, 1)
    counts = [(len(tokens) - 1) // LENGTH for tokens in split.tokens]
    assert len(windows) == sum(counts)
    for number in (0, 1, counts[0] - 1, counts[0], sum(counts) - 1):
        domain = int(number >= counts[0])
        start = (number - counts[0] * domain) * LENGTH
        window = windows[number]
        stream = split.tokens[domain]
        assert window.domain_B == domain and window.mask_BL.all()
        np.testing.assert_array_equal(window.token_BL, stream[start : start + LENGTH])
        np.testing.assert_array_equal(window.target_BL, stream[start + 1 : start + LENGTH + 1])


def test_a_window_needs_one_token_more_than_its_length(dataset):
    split = dataset.split("train")
    shorter = min(map(len, split.tokens))
    # The shorter domain is one target short; the longer has some whole windows.
    longer = (max(map(len, split.tokens)) - 1) // shorter
    assert len(loader.Windows(whole(split), shorter, 1)) == longer
    longer = (max(map(len, split.tokens)) - 1) // (shorter - 1)
    assert len(loader.Windows(whole(split), shorter - 1, 1)) == longer + 1


def test_train_windows_know_the_document_of_each_target(dataset):
    split = dataset.split("train")
    document_of = [
        np.repeat(split.of_domain(d), split.num_tokens_N[split.of_domain(d)]) for d in (0, 1)
    ]
    windows = loader.Windows(whole(split), LENGTH, 1)
    start = [0, 0]
    for number in range(len(windows)):
        window = windows[number]
        d = int(window.domain_B)
        wanted = document_of[d][start[d] + 1 : start[d] + LENGTH + 1]
        np.testing.assert_array_equal(window.document_BL, wanted)
        start[d] += LENGTH


def test_every_window_once_per_epoch_and_shuffled_anew(dataset):
    split, batch_size = dataset.split("train"), 4
    windows = loader.Windows(whole(split), LENGTH, batch_size)
    batches = data.train_batches(dataset, batch_size=batch_size, length=LENGTH, seed=0)
    steps = len(windows)  # batch_size epochs
    rows = [row.tobytes() for step in range(steps) for row in _rows(batches[step])]
    epochs = [rows[i : i + len(windows)] for i in range(0, len(rows), len(windows))]
    wanted = collections.Counter(_rows_of(windows))
    assert len(epochs) == batch_size and all(
        collections.Counter(epoch) == wanted for epoch in epochs
    )
    assert len({tuple(epoch) for epoch in epochs}) == batch_size
    assert batches.steps_per_epoch == len(windows) / batch_size


def _rows(batch):
    return np.concatenate([batch.token_BL, batch.document_BL], axis=1)


def _rows_of(windows):
    return [
        np.concatenate([windows[i].token_BL, windows[i].document_BL]).tobytes()
        for i in range(len(windows))
    ]


def test_a_batch_is_a_function_of_seed_and_step(dataset):
    make = lambda seed: data.train_batches(dataset, batch_size=4, length=LENGTH, seed=seed)  # noqa: E731
    forward, backward, other = make(0), make(0), make(1)
    wanted = [forward[step] for step in range(20)]
    for step in reversed(range(20)):
        for field, again in zip(wanted[step], backward[step], strict=True):
            np.testing.assert_array_equal(field, again)
    assert any((wanted[step].token_BL != other[step].token_BL).any() for step in range(20))
    with pytest.raises(IndexError, match="steps count from 0, came -1"):
        forward[-1]


def test_fields_have_their_shapes_and_types(dataset):
    train = data.train_batches(dataset, batch_size=4, length=LENGTH, seed=0)[7]
    evaluation = data.evaluation_batches(
        dataset, "test", batch_size=4, length=LENGTH, tokens_per_domain=0
    )[0]
    for batch in (train, evaluation):
        assert isinstance(batch, data.Batch)
        shapes = [(field.shape, field.dtype.name) for field in batch]
        row = (4, LENGTH)
        assert shapes == [
            (row, "int32"),
            (row, "int32"),
            (row, "bool"),
            ((4,), "int32"),
            (row, "int32"),
        ]


def test_too_little_text_to_train_on(dataset):
    with pytest.raises(
        DataError, match=r"split has \d+ windows of 4096 tokens .* batch of 64: add"
    ):
        data.train_batches(dataset, batch_size=64, length=4096, seed=0)
    with pytest.raises(DataError, match="batch_size 0 and length 16: wanted at least 1"):
        data.train_batches(dataset, batch_size=0, length=16, seed=0)


@pytest.mark.parametrize("tokens_per_domain", [0, 1, 40, 100, 10**6])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_token_of_the_chosen_documents_is_a_target_once(
    dataset, tokens_per_domain, batch_size
):
    split = dataset.split("test")
    batches = data.evaluation_batches(
        dataset,
        "test",
        batch_size=batch_size,
        length=LENGTH,
        tokens_per_domain=tokens_per_domain,
    )
    targets = collections.defaultdict(list)
    for batch in batches:
        assert batch.token_BL.shape == (batch_size, LENGTH)
        for row in range(batch_size):
            mask = batch.mask_BL[row]
            for token, document in zip(
                batch.target_BL[row][mask], batch.document_BL[row][mask], strict=True
            ):
                targets[int(document)].append(int(token))
                assert split.domain_N[document] == batch.domain_B[row]
            assert (batch.document_BL[row][~mask] == -1).all()
            assert (batch.domain_B[row] == -1) == (not mask.any())
    chosen = np.concatenate(batches.document_D)
    assert sorted(targets) == sorted(chosen.tolist())
    for document, tokens in targets.items():
        assert tokens == split.document(document).tolist()
    assert batches.num_targets == sum(map(len, targets.values()))
    if tokens_per_domain in (0, 10**6):
        assert len(chosen) == len(split)


def test_inputs_are_the_tokens_before_the_targets(dataset):
    batches = data.evaluation_batches(
        dataset, "test", batch_size=3, length=LENGTH, tokens_per_domain=100
    )
    before, domain = None, None
    for batch in batches:
        for row in range(3):
            mask = batch.mask_BL[row]
            for token, target in zip(
                batch.token_BL[row][mask], batch.target_BL[row][mask], strict=True
            ):
                if batch.domain_B[row] != domain:  # a domain's stream starts after an end token
                    before, domain = dataset.tokenizer.end_id, batch.domain_B[row]
                assert token == before
                before = target


def test_budget_is_kept_and_nearly_used(dataset):
    split = dataset.split("train")
    for domain in range(2):
        for budget in (200, 1000):
            chosen = loader.choose_documents(split, domain, budget)
            assert 0.8 * budget <= split.num_tokens_N[chosen].sum() <= budget
            assert len(set(chosen.tolist())) == len(chosen)
            assert (split.domain_N[chosen] == domain).all()
    # Nothing fits into 1 token: the shortest document is better than none.
    (only,) = loader.choose_documents(split, 0, 1)
    assert split.num_tokens_N[only] == split.num_tokens_N[split.of_domain(0)].min()


def test_chosen_documents_are_spread_and_do_not_depend_on_the_batch(dataset):
    split = dataset.split("train")
    chosen = loader.choose_documents(split, 1, 300)
    assert chosen.tolist() != sorted(chosen.tolist())
    make = lambda size: data.evaluation_batches(  # noqa: E731
        dataset, "train", batch_size=size, length=LENGTH, tokens_per_domain=300
    )
    for one, other in zip(make(2).document_D, make(7).document_D, strict=True):
        np.testing.assert_array_equal(one, other)


def test_evaluation_batches_are_a_sequence(dataset):
    batches = data.evaluation_batches(
        dataset, "validation", batch_size=2, length=LENGTH, tokens_per_domain=0
    )
    assert len(list(batches)) == len(batches) == len(batches[:]) > 1
    np.testing.assert_array_equal(batches[-1].token_BL, batches[len(batches) - 1].token_BL)
    assert batches.domains == ("code", "prose")
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_an_empty_split_is_said_when_it_is_needed(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("only one document " * 40)
    section = schema.TextFolder(path=str(tmp_path / "texts"))
    dataset = data.build(section, schema.Byte(), cache=tmp_path)
    sizes = {name: len(dataset.split(name)) for name in data.SPLITS}
    assert sum(sizes.values()) == 1
    empty = next(name for name in ("test", "validation") if not sizes[name])
    with pytest.raises(DataError, match=f"the {empty} split is empty: .* 1 into "):
        data.evaluation_batches(dataset, empty, batch_size=1, length=8, tokens_per_domain=0)
    with pytest.raises(DataError, match="tokens_per_domain -1: wanted"):
        data.evaluation_batches(dataset, "train", batch_size=1, length=8, tokens_per_domain=-1)
