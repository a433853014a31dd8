"""moelab/data/split.py: the rule itself, and that it splits about as it says."""

from moelab.data import split


def test_known_documents():
    # By sha256sum: wiki_enCat 04a3e02f = 77848623, / 2^32 = 0.0181; wiki_enRice 0fcd0164 = 0.0617;
    # wiki_enTomato 1d66e1c8 = 0.1149.
    assert split.document_hash("wiki_en", "Cat").startswith("04a3e02f")
    assert split.split_of("wiki_en", "Cat") == "test"
    assert split.split_of("wiki_en", "Rice") == "validation"
    assert split.split_of("wiki_en", "Tomato") == "train"


def test_thresholds_by_the_first_eight_digits(monkeypatch):
    # 0.05 * 2^32 = 214748364.8 = 0x0ccccccc.c, so 0x0ccccccc is a test document and the next is not;
    # 0.10 * 2^32 = 429496729.6 = 0x19999999.9 likewise for validation.
    cases = {"0ccccccc": "test", "0ccccccd": "validation", "19999999": "validation"}
    cases |= {"1999999a": "train", "00000000": "test", "ffffffff": "train"}
    for digits, wanted in cases.items():
        monkeypatch.setattr(split, "document_hash", lambda *_, digits=digits: digits + "f" * 56)
        assert split.split_of("any", "document") == wanted, digits


def test_shares_of_many_documents():
    splits = [split.split_of("d", str(i)) for i in range(20_000)]
    # Standard deviation of a share of 0.05 over 20,000: sqrt(.05 * .95 / 20000) = 0.0015.
    assert abs(splits.count("test") / 20_000 - 0.05) < 0.006
    assert abs(splits.count("validation") / 20_000 - 0.05) < 0.006


def test_domain_and_id_both_matter():
    names = [str(i) for i in range(400)]
    assert [split.split_of("a", n) for n in names] != [split.split_of("b", n) for n in names]
