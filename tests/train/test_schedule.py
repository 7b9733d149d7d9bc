"""Learning-rate schedules at their corners, between them, and past the end."""

import itertools
import math

import pytest

from train.job.schedule import learning_rate
from train.settings.optim import OptimConfig

STEPS, WARMUP = 1000, 100
COSINE = OptimConfig(lr=1.0, min_lr=0.1, schedule="cosine", warmup_steps=WARMUP)
WSD_LINEAR = OptimConfig(
    lr=1.0, min_lr=0.1, schedule="wsd", warmup_steps=WARMUP, decay_fraction=0.2, decay_shape="linear"
)
WSD_SQRT = OptimConfig(lr=1.0, min_lr=0.1, schedule="wsd", warmup_steps=WARMUP, decay_fraction=0.2, decay_shape="sqrt")
ALL = pytest.mark.parametrize("optim", [COSINE, WSD_LINEAR, WSD_SQRT], ids=["cosine", "linear", "sqrt"])


def at(optim: OptimConfig, step: int, steps: int = STEPS):
    # Sums and products of a few numbers of size 1: a few units in the last place of 1.0.
    return pytest.approx(learning_rate(optim, step, steps), abs=1e-15)


@ALL
def test_warm_up_is_a_straight_line_to_the_peak(optim):
    assert at(optim, 1) == 0.01
    assert at(optim, 50) == 0.5
    assert learning_rate(optim, WARMUP, STEPS) == 1.0


@ALL
def test_the_last_step_and_all_after_it_have_the_least_rate(optim):
    assert [learning_rate(optim, step, STEPS) for step in (STEPS, STEPS + 1, 10 * STEPS)] == [0.1] * 3


@ALL
def test_the_rate_falls_after_the_warm_up_without_jumps(optim):
    rates = [learning_rate(optim, step, STEPS) for step in range(WARMUP, STEPS + 1)]
    steps = [before - after for before, after in itertools.pairwise(rates)]
    assert min(steps) >= 0
    # The steepest is the first step of the sqrt decay over 200 steps: 0.9 * sqrt(1/200).
    assert max(steps) <= 0.9 * math.sqrt(1 / 200) + 1e-12


def test_cosine_at_its_quarters():
    assert at(COSINE, WARMUP + 225) == 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert at(COSINE, WARMUP + 450) == 0.55
    assert at(COSINE, WARMUP + 675) == 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2


@pytest.mark.parametrize(("optim", "half"), [(WSD_LINEAR, 0.55), (WSD_SQRT, 0.1 + 0.9 * (1 - math.sqrt(0.5)))])
def test_wsd_is_constant_and_then_decays(optim, half):
    assert {learning_rate(optim, step, STEPS) for step in range(WARMUP, 801)} == {1.0}
    assert learning_rate(optim, 801, STEPS) < 1.0
    assert at(optim, 900) == half


@ALL
def test_without_warm_up_the_first_step_is_near_the_peak(optim):
    plain = OptimConfig(lr=1.0, min_lr=0.1, schedule=optim.schedule, warmup_steps=0, decay_shape=optim.decay_shape)
    assert learning_rate(plain, 1, STEPS) == pytest.approx(1.0, abs=1e-5)


@ALL
def test_a_run_shorter_than_its_warm_up_ends_on_the_ramp(optim):
    assert [at(optim, step, 5) for step in (1, 5)] == [0.01, 0.05]


def test_a_decay_longer_than_the_rest_starts_at_the_end_of_the_warm_up():
    optim = OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup_steps=50, decay_fraction=1.0, decay_shape="linear")
    assert at(optim, 50, 100) == 1.0
    assert at(optim, 75, 100) == 0.5
