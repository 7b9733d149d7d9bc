"""Steps that cannot be right are skipped by all processes alike; after some in a row the run goes back."""

import json
from pathlib import Path

import pytest

from tests.faults.harness import Injection, contents, losses, start, tokens
from tests.faults.injections import HeldoutAway, Poison, Several
from tests.faults.runs import campaign_config, make_corpus
from train.job.bad_steps import History, go_back
from train.job.left_out import LEFT_OUT_FILE, read_left_out
from train.job.shelf import Shelf, write_state
from train.settings.run import Config, RunConfig

TOKENS = 8 * 32  # of a step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def trained(config: Config, inject: Injection | None = None, code: int = 0) -> str:
    """What a whole run on two processes prints."""
    log = config.run.path / "log"
    assert start(config, 2, log, inject).wait() == code, log.read_text()[-3000:]
    return log.read_text()


LAYOUTS = {"EP2": {}, "PP2": {"parallel": {"expert": 1, "pipeline": 2}, "model": {"pattern": "GE|*E"}}}


@pytest.mark.parametrize(("layout", "passes"), [("EP2", "backward"), ("PP2", "forward")])
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(tmp_path, corpus, layout, passes):
    run = {"steps": 3, "save_every": 1, "eval_every": 0}
    config = campaign_config(tmp_path, "run", corpus, run=run, **LAYOUTS[layout])
    poison = Poison(rank=1, tokens_before=(TOKENS,), passes=passes)
    output = trained(config, Several((poison, HeldoutAway(rank=1))))
    assert "warning: process 1 could not read held-out text: a shard is gone" in output
    assert "this evaluation is left out; training goes on" in output
    assert "warning: step 2 was skipped: " in output and "its samples were 8 to 15" in output
    lines = [json.loads(line) for line in (config.run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert not any(name.startswith("heldout_lm_loss") for name in lines[-1])
    assert lines[1]["grad_norm"] is None and (lines[1]["loss"] is None) == (passes == "forward")
    (entry,) = [json.loads(line) for line in (config.run.path / "logs" / "bad_steps.jsonl").read_text().splitlines()]
    assert entry["samples"] == [8, 15] and entry["parameters"][0].startswith("embedding")
    # Weights, moments and counts were left alone, and then went on.
    first, second, third = (contents(Shelf(config.run.checkpoints).path(step)) for step in (1, 2, 3))
    assert first == second and first.keys() == third.keys()
    assert all(third[name] != digest for name, digest in first.items() if name.startswith("optimizer.exp_avg."))


def test_bad_steps_in_a_row_go_back_and_leave_their_samples_out_as_a_resumed_run_does(tmp_path, corpus):
    bad = (4 * TOKENS, 5 * TOKENS)  # steps 5 and 6, after the checkpoint of step 3
    changes = {"run": {"steps": 9, "eval_every": 0}, "optim": {"rewind_after": 2}}
    config = campaign_config(tmp_path, "run", corpus, **changes)
    output = trained(config, Poison(rank=0, tokens_before=bad, passes="backward"))
    assert "going back to step 3: samples 32 to 47 are left out" in output
    assert json.loads((config.run.path / LEFT_OUT_FILE).read_text()) == [[32, 47]]
    by_hand = campaign_config(tmp_path, "hand", corpus, **changes, data={"skip": ((32, 47),)})
    trained(by_hand)
    assert losses(config.run.path) == losses(by_hand.run.path)
    assert tokens(config.run.path) == tokens(by_hand.run.path)
    # It stops after its next save, and goes on with the samples that it would have read.
    parts = campaign_config(tmp_path, "parts", corpus, **changes | {"run": {"steps": 6, "eval_every": 0}})
    trained(parts, Poison(rank=0, tokens_before=bad, passes="backward"))
    rest = campaign_config(tmp_path, "parts", corpus, **changes)
    trained(rest)
    assert tokens(rest.run.path) == tokens(config.run.path)


def test_without_a_checkpoint_to_go_back_to_the_run_says_what_to_do(tmp_path, corpus):
    config = campaign_config(tmp_path, "run", corpus, optim={"rewind_after": 2})
    output = trained(config, Poison(rank=0, tokens_before=(0, TOKENS), passes="forward"), code=1)
    assert "steps 1 and on are bad, and there is no checkpoint before them" in output
    assert "data.skip=[[0,15]]" in output


def test_a_run_that_is_killed_while_it_goes_back_does_its_bad_steps_again(tmp_path, monkeypatch):
    run = RunConfig(name="run", dir=str(tmp_path))
    shelf = Shelf(run.checkpoints)
    for step in (3, 5, 6):
        write_state(shelf.prepare(step), step, {}, {})
        shelf.publish(step)
    delete, done = Shelf.delete, []

    def killed(self: Shelf, step: int) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(step)
        delete(self, step)

    monkeypatch.setattr(Shelf, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        go_back(run, 5, range(32, 48))
    assert shelf.steps() == [3, 5] and not read_left_out(run.path)
    monkeypatch.undo()
    assert go_back(run, 5, range(32, 48)) == 3
    assert shelf.steps() == [3] and read_left_out(run.path) == [(32, 47)]


def test_a_spike_is_what_lies_far_above_the_steps_before_it():
    history = History(window=4, factor=3.0)
    assert not history.spikes(100.0)
    for value in (1.0, 1.2, 0.8, 1.0):
        history.add(value)
    assert history.spikes(1.5) and not history.spikes(1.4)  # the mean is 1.0, the deviation 0.141
    history.add(float("nan"))
    assert list(history.values) == [1.0, 1.2, 0.8, 1.0]
    assert not History(4, 0.0, history.values).spikes(1e9)
