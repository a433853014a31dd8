"""moelab/data/split.py: the rule itself, and that it splits about as it says."""

import hashlib

from moelab.data import split


def test_known_documents():
    # sha256("wiki_enTomato") and so on, first 8 digits / 2^32, worked out with sha256sum:
    #   wiki_en + Tomato: below; the shares come from the hexadecimal digits alone.
    for domain, name in (("wiki_en", "Tomato"), ("code", "sympy/core/add.py"), ("verse", "kjv/1")):
        digits = hashlib.sha256(f"{domain}{name}".encode()).hexdigest()[:8]
        share = int(digits, 16) / 2**32
        wanted = "test" if share < 0.05 else "validation" if share < 0.1 else "train"
        assert split.split_of(domain, name) == wanted


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
