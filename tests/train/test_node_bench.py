"""The benchmark of a node's layouts: what it measures on how many cards, what it concludes, and all of it in small."""

import json
from pathlib import Path

import pytest

from tests.bench import node
from tests.bench.node import Asked, Results, cells, judge, layouts, page


def test_every_number_of_cards_has_the_layouts_that_divide_it() -> None:
    assert list(layouts(2)) == ["one card", "EP2", "CP2"]
    assert list(layouts(8)) == ["one card", "EP8", "EP4 x DP2", "CP2 x EP4", "CP8"]
    names = [cell.name for cell in cells(Asked(8, 9.0, False, "", ()))]
    assert len(set(names)) == len(names)
    wanted = ["EP8, 4 blocks", "EP4 x DP2, 12 blocks", "CP2 x EP4, 4 blocks, 262,144 tokens", "losses, PP2 x EP4"]
    assert {*wanted, "CP8, 4 blocks, 32,768 tokens", "losses, CP8", "exchange", "save and load"} <= {*names}


def measured(eight: float, long: float, losses: list[float]) -> Results:
    """Results of eight cards with these speeds, and these losses of the second layout."""
    one = {"8 x 4096": {"tokens_per_second": 100.0, "milliseconds": 1.0, "tflops": 1.0, "gigabytes": None}}
    found = {
        "one card, 4 blocks": one,
        "EP8, 4 blocks": {"8 x 4096": one["8 x 4096"] | {"tokens_per_second": eight}},
        "CP8, 4 blocks, 131,072 tokens": {"1 x 131072": one["8 x 4096"] | {"tokens_per_second": long}},
        "losses, EP8": {"lm_loss": [10.0, 9.0, 8.0, 7.0]},
        "losses, CP8": {"lm_loss": losses},
    }
    return Results(cells=found, left_out={"save and load": "no time: 540 s had passed"})


@pytest.mark.parametrize(
    ("eight", "long", "losses", "holding"),
    [
        (91.0, 61.0, [10.01, 9.0, 8.0, 7.1], [True, True, True]),
        (89.0, 61.0, [10.01, 9.0, 8.0, 7.1], [False, True, True]),
        (91.0, 59.0, [10.0, 9.0, 8.0, 7.3], [True, False, False]),
        (91.0, 61.0, [10.1, 9.0, 8.0, 7.0], [True, True, False]),
    ],
)
def test_what_must_hold_is_judged(eight: float, long: float, losses: list[float], holding: list[bool]) -> None:
    results = measured(eight, long, losses)
    results.verdicts = judge(results, 8)
    assert ["DOES NOT HOLD" not in words for words in results.verdicts.values()] == holding
    assert "left out: save and load: no time" in page(results) and "| EP8, 4 blocks | 8 x 4096 |" in page(results)


@pytest.mark.slow  # a minute and a half on two cores
def test_all_of_it_in_small(tmp_path: Path) -> None:
    """Two processes: every cell is there or says why not, and the layouts' losses agree."""
    output = tmp_path / "node.json"
    results = node.measure(Asked(2, 5.0, True, str(output), ("data.cache=.cache/corpus",)))
    every = {cell.name for cell in cells(Asked(2, 5.0, True, "", ()))}
    assert {*results.cells} | {*results.left_out} == every and not results.left_out
    assert json.loads(output.read_text())["cells"].keys() == results.cells.keys()
    agreeing = [words for name, words in results.verdicts.items() if name.startswith("losses")]
    assert len(agreeing) == 3 and all("holds" in words for words in agreeing)
    exchange = results.cells["exchange"]
    assert exchange["rows_a_token_once_a_card"] <= 1 < exchange["rows_a_token"]
