"""The lab: its arms compose, its tables follow from kept runs, its variations do what they say."""

import itertools
import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.lab import corpus, kept, one, page
from tests.lab.__main__ import number_of_steps
from tests.lab.arms import (
    ARMS,
    BASE,
    COMPARISONS,
    EARLY,
    GAIN_LEAST,
    GAIN_SPREAD,
    MINIATURE,
    ORDER,
    RECIPE,
    SHARPEST,
    STEPS,
    run_name,
)
from tests.lab.lease import Lease, order, steps_for
from tests.lab.plot import svg, ticks
from train.__main__ import compose
from train.settings.run_checks import check_plan
from train.watch import catalog


def made(arm: str, seed: int, loss: float) -> dict:
    """A run as it is kept, of three lines."""
    lines = [
        {"step": step, "tokens": 100 * step, "lm_loss": loss, "heldout_lm_loss": loss + step, "max_violation": step}
        for step in (1, 200, 400)
    ]
    lines[-1] |= {"attention_sink": 0.2, "attention_sink/1": 0.1, "attention_sink/2": 0.3}
    lines[-1] |= {"norm_gain_max/out_norm": 1.5, "norm_gain_min/out_norm": 0.25}
    return {"arm": arm, "seed": seed, "machine": {"device": "none"}, "metrics": lines, "config": {}}


def test_every_arm_is_a_model_that_can_be_trained() -> None:
    for name, arm in ARMS.items():
        assert check_plan(compose(["-cn", RECIPE, *arm.overrides]), 1).world == 1, name
    assert check_plan(compose(["-cn", RECIPE, *MINIATURE]), 1).world == 1


def test_every_arm_is_compared_and_has_its_place() -> None:
    used = {arm for comparison in COMPARISONS.values() for arm in comparison.arms}
    assert used == set(ARMS) == set(itertools.chain(*ORDER))
    assert len(order()) == 3 * len(ARMS) and order()[0] == ("3 steps", 1) and (BASE, 3) in order()[:30]


def test_what_is_read_is_measured() -> None:
    own = {GAIN_SPREAD, GAIN_LEAST, SHARPEST, "mutual information"}
    for comparison in COMPARISONS.values():
        for name in (*comparison.measures, comparison.curve):
            plain = name.removesuffix(EARLY)
            assert plain in own or catalog.find(plain) or plain.startswith(("heldout_needle", "heldout_lm_loss/")), name


def test_a_probe_that_fails_is_kept_and_told_and_a_mistake_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(error: Exception) -> Callable[[object], dict[str, float]]:
        def probe(_: object) -> dict[str, float]:
            raise error

        return probe

    there = {"sources": broken(torch.OutOfMemoryError("no memory")), "losses": lambda job: {"heldout_lm_loss": 3.0}}
    monkeypatch.setattr(one, "PROBES", there)
    values = one.measured(None)
    assert values == {"heldout_lm_loss": 3.0, "failed probe/sources": 1.0} and all(map(kept.is_kept, values))
    line = {"step": 5, "tokens": 9} | values
    told = page.where({(BASE, 3): {"machine": {}, "metrics": [line]}})
    assert f"{run_name(BASE, 3)} lacks what a probe that failed would say: sources." in told
    monkeypatch.setattr(one, "PROBES", there | {"needles": broken(KeyError("a mistake"))})
    with pytest.raises(KeyError):
        one.measured(None)


def test_attention_alone_has_as_many_weights_as_deltanet() -> None:
    from model.backend import linear_sizes

    model = compose(["-cn", RECIPE, *ARMS["attention"].overrides]).model
    base = compose(["-cn", RECIPE]).model
    sizes, own = linear_sizes(base), linear_sizes(model)
    delta = math.prod(sizes["in_proj"]) + math.prod(sizes["out_proj"])
    attention = math.prod(own["linear_qkv"]) + math.prod(own["linear_proj"])
    assert attention == pytest.approx(delta, rel=0.01)


def test_the_page_is_what_the_kept_runs_say() -> None:
    """Byte for byte; without kept runs there is no page."""
    runs = kept.read_all()
    assert page.PAGE.exists() == bool(runs)
    if runs:
        assert page.PAGE.read_text() == page.page(runs)
        drawn = {path.name: path.read_text() for path in (page.PAGE.parent / "plots").glob("*.svg")}
        assert drawn == page.plots(runs)


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds differ by far more than arms do, and the difference is still settled."""
    runs = {(BASE, seed): made(BASE, seed, 10.0 * seed) for seed in (1, 2, 3)}
    runs |= {("gate off", seed): made("gate off", seed, 10.0 * seed + 0.5 + 0.01 * seed) for seed in (1, 2, 3)}
    text = page.page(runs)
    assert "| gate off - base | heldout_lm_loss | +0.52 | 0.02 | settled: higher |" in text
    assert "| base | 3 | 420 (10) | 0.2 (0) | 0.3 (0) |  |  |" in text
    assert "| attention | not run |" in text and "plots/f.svg" not in text
    assert page.reading(runs[BASE, 1], GAIN_SPREAD) == 0.75 and page.reading(runs[BASE, 1], GAIN_LEAST) == 0.25
    assert page.reading(runs[BASE, 1], "max_violation early") == 100.5


@pytest.mark.parametrize(
    ("mean", "missed", "seeds", "said"),
    [
        (-0.5, 0.4, 3, "settled: lower"),
        (0.3, 0.4, 3, "not settled; up to 0.4 could have been missed"),
        (9.0, 0.1, 2, "2 seeds only"),
    ],
)
def test_a_verdict(mean: float, missed: float, seeds: int, said: str) -> None:
    assert page.verdict(mean, missed, seeds) == said


def test_runs_of_unequal_length_are_not_compared() -> None:
    short = made("gate off", 1, 1.0)
    short["metrics"].pop()
    assert "nothing here may be compared" in page.where({(BASE, 1): made(BASE, 1, 1.0), ("gate off", 1): short})


def test_a_kept_run_comes_back_without_what_says_nothing(tmp_path: Path) -> None:
    lines = [
        {"step": step, "lm_loss": 1.23456789, "seconds/step": 1.0, "expert_load/1": [1.0], "max_violation/1": 1.0}
        for step in range(10, 1010, 10)
    ]
    lines[-1] |= {"attention_sink/2": 0.1, "mtp_loss/1": 2.0, "heldout_lm_loss/after_511": 3.0}
    kept.keep(tmp_path, "base_1", made(BASE, 1, 1.0) | {"metrics": kept.trimmed(lines)})
    [found] = kept.read_all(tmp_path).values()
    assert len(found["metrics"]) == 20 + 16  # to step 200 each, then every 50th
    assert found["metrics"][0] == {"step": 10, "lm_loss": 1.23457}
    assert set(found["metrics"][-1]) == {"step", "lm_loss", *list(lines[-1])[-3:]}
    [directory] = kept.unpack(tmp_path, tmp_path / "runs")
    assert json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])["step"] == 10


def test_no_run_starts_that_would_not_end_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(tmp_path, tmp_path, 1, deadline=1e12)
    lease.durations = {BASE: [145.0]}
    assert lease.expected("3 steps") == 260.0  # 30 s of its own, and twice 115
    monkeypatch.setattr(Lease, "left", lambda self: 200.0)
    monkeypatch.setattr(Lease, "start", lambda self, *_, **__: pytest.fail("it was started"))
    assert lease.train([("3 steps", 1)]) == ["3_steps_1: no time"]


def test_all_kept_runs_are_equally_long(tmp_path: Path) -> None:
    lease = Lease(tmp_path, tmp_path, 1, deadline=1e12)
    asked = Namespace(kept=tmp_path, steps="", miniature=False, slots=1)
    assert number_of_steps(asked, lease) == compose(["-cn", RECIPE]).run.steps == STEPS
    kept.keep(tmp_path, "base_1", made(BASE, 1, 1.0))  # of 400 steps
    assert number_of_steps(Namespace(**vars(asked) | {"steps": "auto"}), lease) == 400
    with pytest.raises(ValueError, match="--steps 300 beside kept runs of \\[400\\] steps"):
        number_of_steps(Namespace(**vars(asked) | {"steps": "300"}), lease)


def test_runs_are_as_long_as_the_lease_allows() -> None:
    short, long = (steps_for(100.0, seconds, slots=12) for seconds in (300.0, 500.0))
    assert 300 <= short < long <= 2400 and long % 50 == 0


def test_a_plot_has_a_line_for_each_arm() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    text = svg("x < y", {"one": [(1, 0.0, 0.5, 1.0), (2, 0.0, 0.5, 1.0)], "two": [(1, 1.0, 1.0, 1.0)]})
    assert text.count('stroke-width="1.6"') == 2 and "x &lt; y" in text


def test_a_page_of_html_becomes_its_text() -> None:
    text = "<head><title>no</title></head><body><nav>no</nav><p>One <b>two</b></p><script>no</script><p>three"
    assert corpus.page_text(text) == "One two\nthree"


def test_documents_are_chosen_by_name_alone() -> None:
    found = [(f"d{number}", "x" * 100) for number in range(50)]
    chosen = corpus.choose(found, 1000)
    assert chosen == corpus.choose(found[::-1], 1000) == sorted(chosen) and len(chosen) == 10
