"""moelab/segregation.py: what experts say about dirt within a domain, counted by hand."""

import math

import numpy as np
import pytest

from moelab import segregation
from moelab.trace import Trace, TraceError

# Two domains of four documents with two tokens each; documents 1, 3 of a and 5, 7 of b are dirty.
DOCUMENT_T = np.repeat(np.arange(8), 2)
DOMAIN_T = np.repeat([0, 1], 8)
OF_DOCUMENT = {str(number): number % 2 for number in range(8)}


def made(expert_T, of_document=OF_DOCUMENT, names=("clean", "noise"), **fields):
    """A trace of one layer, one slot."""
    values = dict(
        expert_MTK=np.asarray(expert_T)[None, :, None],
        token_id_T=np.zeros(len(expert_T), int),
        domain_T=DOMAIN_T,
        document_T=DOCUMENT_T,
        layers=[0],
        domains=["a", "b"],
        num_experts=4,
        num_columns=4,
        header={"quality": {"by": "label", "names": list(names), "of_document": dict(of_document)}},
    )
    return Trace(**(values | fields))


def test_load_by_bucket():
    # Expert 0 takes clean text of a, 1 its noise, 2 all of b.
    expert_T = np.where(DOMAIN_T == 1, 2, DOCUMENT_T % 2)
    np.testing.assert_array_equal(segregation.load(made(expert_T)), [[[4, 0, 4, 0], [0, 4, 4, 0]]])


def test_an_expert_of_a_domain_is_no_expert_of_its_dirt():
    """All of a is clean and all of b is noise: I(expert; bucket) is ln 2, within domains there is nothing to know."""
    of_document = {str(number): int(number >= 4) for number in range(8)}
    assert segregation.specialisation(made(DOMAIN_T, of_document)) is None
    # One document of each domain is the other kind: now it can be asked, and the answer is 0.
    of_document |= {"0": 1, "7": 0}
    found = segregation.specialisation(made(DOMAIN_T, of_document))
    assert found.mi_M[0] == 0 and found.p_value_M[0] == 1


def test_the_mean_over_domains_by_hand():
    # In a the experts 0 and 1 divide by quality: ln 2. In b expert 2 takes all: 0. Half of the tokens each.
    expert_T = np.where(DOMAIN_T == 1, 2, DOCUMENT_T % 2)
    found = segregation.specialisation(made(expert_T), permutations=500)
    assert found.mi_M[0] == pytest.approx(math.log(2) / 2)
    assert found.normalised_M[0] == pytest.approx(1 / 2)  # H(bucket | domain) = ln 2
    # Of the 6 ways to have two of four documents dirty in a, 2 divide it as well: p = (1 + about 500 / 3) / 501.
    assert found.p_value_M[0] == pytest.approx(1 / 3, abs=0.07)
    again = segregation.specialisation(made(expert_T), permutations=500)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))


def test_text_without_buckets_has_none():
    plain = made(DOMAIN_T, header={})
    assert segregation.bucket_of(plain) is None and segregation.load(plain) is None
    assert segregation.specialisation(plain) is None


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({"names": ["clean"]}, "wants names and of_document"),
        ({"names": ["clean"], "of_document": {"0": 0}}, "has no bucket for document 1"),
        ({"names": ["clean"], "of_document": {str(n): 1 for n in range(8)}}, "has bucket 1 of 1"),
        ({"names": ["clean"], "of_document": [0] * 8}, "wants names and of_document"),
    ],
)
def test_headers_that_do_not_fit_are_refused(quality, message):
    with pytest.raises(TraceError, match=message):
        segregation.bucket_of(made(DOMAIN_T, header={"quality": quality}))
    with pytest.raises(ValueError, match="at least 1"):
        segregation.specialisation(made(DOMAIN_T), permutations=0)
