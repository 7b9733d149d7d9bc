"""What a step says of its routers, from counts that are known."""

import pytest
import torch

from model.layers.balance import NOTES
from train.routing import LayerLoad, spread_line
from train.watch import metrics


def test_the_numbers_of_a_layer() -> None:
    """Two uses of a router with four experts, which took 8, 6, 2 and 0 of 16 tokens: 2, 1.5, 0.5 and 0 even shares."""
    counts, scores = torch.tensor([[5, 3, 0, 0], [3, 3, 2, 0]]), torch.tensor([[0.2, 0.2, 0.05, 0.05]] * 2)
    notes = dict.fromkeys(NOTES, 0.0) | {"entropy": 1.25}
    values = LayerLoad(counts, scores.double(), notes).statistics()
    # Four experts times the sum of f x P, added up over the uses: each P holds half of its scores.
    assert values[metrics.BALANCE_LOSS] == pytest.approx(4 * (0.2 * (5 + 3) + 0.2 * (3 + 3) + 0.05 * 2) / 8)
    assert values[metrics.MAX_VIOLATION] == pytest.approx(1.0)
    assert values[metrics.LOAD_VARIATION] == pytest.approx(((1 + 0.25 + 0.25 + 1) / 4) ** 0.5)
    assert (values[metrics.LOAD_MIN], values[metrics.LOAD_P50]) == pytest.approx((0.0, 1.0))
    assert values[metrics.DEAD_EXPERTS] == 1.0 and values[metrics.ROUTER_ENTROPY] == 1.25


def test_the_line_of_a_new_run() -> None:
    values = {metrics.MAX_VIOLATION: 0.5, metrics.LOAD_VARIATION: 0.25}
    values |= {metrics.as_drawn(metrics.MAX_VIOLATION): 1.0, metrics.as_drawn(metrics.LOAD_VARIATION): 0.75}
    assert spread_line(values) == (
        "expert load of the first batch, mean over layers: fullest 1.50 x an even share, coefficient of variation 0.25"
        "; with router rows as drawn, not of equal norm: fullest 2.00 x an even share, coefficient of variation 0.75"
    )
