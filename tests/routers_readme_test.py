"""The tables of moelab/routers/README.md say what the code says."""

from pathlib import Path

import pytest
from routing_cases import make_router

from moelab import balance, routers
from moelab.report import conventions

README = Path(__file__).parent.parent / "moelab/routers/README.md"
NUM_EXPERTS, K, LAYERS, STEPS = 8, 4, 16, 2


def table(first):
    """Rows of the table whose first heading this is, by first cell, as {heading: cell}."""
    lines = README.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[start:]]
    end = next(i for i, line in enumerate(lines[start:]) if not line.startswith("|"))
    heads = cells[0]
    return {row[0].strip("`"): dict(zip(heads, row, strict=True)) for row in cells[2:end]}


ROUTERS = table("`router.kind`")


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_router_declares_what_its_row_says(kind):
    """Whoever adds a router need not edit the table; what it has is right."""
    row, router = ROUTERS[kind], make_router(kind, NUM_EXPERTS)
    assert (row["causal"] == "yes") == router.causal
    assert (row["causal"] == "not in training") == ("in training" in router.reason)
    assert (row["group"] == "micro-batch of a device") == router.competes
    assert row["group"] in ("token", "micro-batch of a device")
    slots = {"k": router.k, "E": NUM_EXPERTS, "1": 1, "any": None}
    assert slots[row["slots"]] == router.slots
    assert (row["bias"] == "yes") == router.takes_bias
    assert (row["ranked"] == "yes") == router.ranked
    papers = [w for w in routers.module(kind).__doc__.replace("(", " ").split() if "arXiv" in w]
    assert all(w.strip(".,;)").removeprefix("arXiv:") in README.read_text() for w in papers)


def test_every_kind_named_is_there():
    named = table("`balance.NAME`")
    kinds = {kind.strip("` ") for cell in named for kind in cell.split(",")}
    assert kinds <= set(balance.KINDS) and set(ROUTERS) <= set(routers.KINDS)


def test_the_coefficients_are_those_that_are_computed():
    rows = table("system")
    ours = rows.pop("moelab")
    assert ours["one micro-batch"] == "a" and ours["its loss at balance"] == "1"
    once = conventions.equivalent(1.0, K, NUM_EXPERTS, LAYERS)
    often = conventions.equivalent(1.0, K, NUM_EXPERTS, LAYERS, STEPS)
    assert list(rows) == [system.system for system in once]
    at_balance = {"1": 1, "k": K, "M": LAYERS}
    values = {"a": 1, "a / M": 1 / LAYERS, "a / k": 1 / K, "a / (k A)": 1 / (K * STEPS)}
    for alone, accumulated in zip(once, often, strict=True):
        row = rows[alone.system]
        assert row["setting"] == f"`{alone.setting}`"
        assert (
            row["one micro-batch"] == alone.formula
            and row["A micro-batches"] == accumulated.formula
        )
        assert at_balance[row["its loss at balance"]] == alone.at_balance
        assert values[alone.formula] == alone.value
        assert accumulated.value is None or values[accumulated.formula] == accumulated.value
