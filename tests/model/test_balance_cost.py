"""The bytes that the balance of experts moves, against a step of the recipe `proxy` (`tests.bench.balance_cost`)."""

import torch

from tests.bench.balance_cost import BANDWIDTH, FORECAST, MIXTURES, ROUTING, added, counted, make_case

STEP_SECONDS = 0.2482  # 8 sequences on one H200: tests/bench/RESULTS.md


def test_counts_loss_and_statistics_move_few_bytes(groups) -> None:
    """All of it, statistics and forecast in every step, would take under 1 % even where no kernel fuses anything.

    Routing itself is counted as well, so that a counter that sees nothing does not pass.
    """
    found = added(make_case(sequences=8, micro_batches=4, device=torch.device("meta"), groups=groups), counted)
    seconds = {kind: MIXTURES * count / BANDWIDTH for kind, (_, count) in found.items()}
    # 32,768 tokens of 2048 bfloat16 numbers, and of 512 float32 scores, at least read and written once.
    assert found[ROUTING][1] > 2 * 32768 * (2048 * 2 + 512 * 4)
    extra = sum(time for kind, time in seconds.items() if kind != ROUTING)
    assert 0 < seconds[FORECAST] < extra < 0.01 * STEP_SECONDS
