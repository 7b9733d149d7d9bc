"""The commands as a user runs them: real processes, a small model on a small corpus."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from data.order.batches import Batch
from tests.faults.runs import make_corpus
from tests.train.wandb_files import history
from train.observe import due
from train.use.generate import choose
from train.use.heldout import in_groups, unigram_entropy
from train.watch import catalog
from train.watch.dashboard import SECTIONS, View
from train.watch.speed import matmul_rate

ROOT = Path(__file__).parents[2]
LOSSES = ("loss", "lm_loss", "mtp_loss/1", "mtp_loss/2", "balance_loss", "z_loss", "grad_norm")
EVERY = ("every_step/lm_loss", "every_step/grad_norm", "clipped_steps", "grad_norm/max", "lm_loss/mean")
SPEEDS = ("tokens_per_second", "tflops", "mfu", "peak_tflops", "matmul_share", "seconds/step")
CONTRACT = {"step", "tokens", *LOSSES, "lr", *SPEEDS, *EVERY}
SMALL = [
    "run.steps=4",
    "run.log_every=1",
    "run.eval_samples=6",
    "data.seq_length=48",
    "batch.global=8",
    "batch.micro=2",
    "model.hidden_size=32",
    "model.pattern=GE*E",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


class Commands:
    """Runs `python -m train ...` with the runs of one directory."""

    def __init__(self, runs: Path, corpus: Path) -> None:
        self.runs, self.corpus = runs, corpus

    def start(self, *arguments: str, processes: int | None = 2) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if name != "NPROC"} | {"OMP_NUM_THREADS": "1"}
        environment |= {"NPROC": str(processes)} if processes else {}
        return subprocess.Popen(
            [sys.executable, "-m", "train", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, processes: int | None = 2, code: int = 0) -> str:
        process = self.start(*arguments, processes=processes)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        return output

    def settings(self, name: str, *changes: str) -> list[str]:
        return ["train", *SMALL, f"run.dir={self.runs}", f"run.name={name}", f"data.corpus={self.corpus}", *changes]

    def train(self, name: str, *changes: str, processes: int = 2, code: int = 0) -> str:
        return self.run(*self.settings(name, *changes), processes=processes, code=code)

    def metrics(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.runs / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[list[float]]:
        return [[entry[key] for key in LOSSES] for entry in self.metrics(name)]


@pytest.fixture
def commands(tmp_path: Path, corpus: Path) -> Commands:
    return Commands(tmp_path / "runs", corpus)


def test_a_run_is_repeatable_bit_for_bit_and_keeps_the_contract_of_its_directory(commands: Commands):
    output = commands.train("first")
    # Neither gauges nor a profile change what is computed.
    watched = ("run.detail_every=2", "run.profile=[3,4]", "wandb.mode=offline")
    profiled = commands.train("second", *watched, "run.save_every=2", "run.eval_every=2", "run.eval_prompts=2")
    assert commands.losses("first") == commands.losses("second")
    assert_traces(commands.runs / "second" / "logs", profiled)
    assert_catalogued(commands.metrics("second"))
    assert_shown(history(commands.runs / "second"), commands.metrics("second"))
    assert [entry["step"] for entry in commands.metrics("first")] == [1, 2, 3, 4]
    assert set(commands.metrics("first")[0]) >= CONTRACT
    speeds = commands.metrics("first")[-1]
    assert speeds["every_step/lm_loss"] == [pytest.approx(speeds["lm_loss"])]
    # A step's time is from step to step: of this process's waiting for samples, passes and update.
    own = speeds["seconds/step"] - speeds["seconds/forward_backward"] - speeds["seconds/optimizer"]
    assert 0 < own <= speeds["seconds/data"] * (1 + 1e-9)
    read = speeds["tokens"] - commands.metrics("first")[-2]["tokens"]
    assert speeds["tokens_per_second"] * speeds["seconds/step"] == pytest.approx(read)
    # A CPU has no data sheet: the peak is the rate that was measured.
    assert speeds["mfu"] == speeds["matmul_share"] == pytest.approx(speeds["tflops"] / speeds["peak_tflops"])
    assert "heldout_unigram_entropy" in commands.metrics("first")[-1]
    assert "unigram entropy" in output and "held-out lm_loss" in output
    assert "expert load of the first batch, mean over layers: fullest" in output
    first, second, *_ = (set(entry) for entry in commands.metrics("first"))
    assert {name for name in first - second if "as_drawn" in name} == {
        f"{name}_rows_as_drawn{layer}"
        for name in ("max_violation", "expert_load_cv")
        for layer in ("", "/1", "/2", "/mtp")
    }
    assert (commands.runs / "first" / "config.yaml").is_file()
    assert [path.name for path in (commands.runs / "first" / "checkpoints").iterdir()] == ["step_00000004"]
    # Another seed is another run, and a bound on experts leaves assignments to none.
    commands.train("third", "seed=2", "balance.capacity=1.0")
    assert commands.losses("third")[0] != commands.losses("first")[0]
    assert all(0 < entry["dropped_share"] < 0.5 for entry in commands.metrics("third"))


def assert_traces(logs: Path, output: str) -> None:
    """Each process's trace of two steps, with the layers by name."""
    assert "profiled: " in output
    for rank in range(2):
        with gzip.open(logs / f"profile_3_4_process_{rank}.json.gz", "rt") as file:
            names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
        for layer in ("step 3", "Gated DeltaNet, layer 1", "experts, layer 2", "attention, layer 3"):
            assert names.count(layer) == (1 if layer.startswith("step") else 4), layer  # two micro-batches a step
        assert "step 2" not in names


ELSEWHERE = {
    catalog.GPU,
    catalog.APART,
    "balance.forced",
    "balance.capacity",
}  # what no run has whose metrics are looked through


def assert_catalogued(entries: list[dict]) -> None:
    """Everything in the log is declared, what is declared is there and is no mere zero, when it should be."""
    logged = {key: [entry[key] for entry in entries if key in entry] for entry in entries for key in entry}
    unknown = [key for key in logged if key != "step" and catalog.find(key) is None]
    assert not unknown
    zero = [key for key, values in logged.items() if key != "step" and not any(map(any_of, values))]
    assert [key for key in zero if not catalog.find(key).rarely] == []
    found = {(metric.name, metric.kind) for metric in map(catalog.find, logged.keys() - {"step"})}
    expected = [one for one in catalog.METRICS if one.when not in ELSEWHERE and not one.rarely]
    assert [one.name for one in expected if (one.name, one.kind) not in found] == []
    gauges = [key for key in logged.keys() - {"step"} if catalog.find(key).cadence == catalog.Cadence.DETAIL]
    assert len(gauges) > 50 and all(len(logged[key]) == 3 for key in gauges)  # of steps 1, 2 and 4


def assert_shown(at_wandb: list[dict], entries: list[dict]) -> None:
    """W&B has what metrics.jsonl has, and every panel finds its metrics there."""
    for own, entry in zip(at_wandb, entries, strict=True):
        single = {key: value for key, value in entry.items() if not isinstance(value, list)}
        assert {key: own.get(key) for key in single} == single
    logged = {key for own in at_wandb for key in own}
    for panel in (panel for section in SECTIONS for panel in section.panels):
        if panel.view is View.COLUMNS:
            found = [f"{name}/path" for name in panel.metrics] if find_spec("PIL") else []
            assert logged >= set(found)
        elif not {metric.when for metric in panel.declared} <= ELSEWHERE:
            names = panel.names(logged)
            wanted = [one for one in panel.declared if not one.rarely]
            absent = [one.name for one in wanted if not any(re.fullmatch(panel.pattern(one), n) for n in names)]
            assert absent == [], panel.title


def any_of(value: float | list[float]) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def test_a_run_resumes_exactly_and_a_finished_one_says_so(commands: Commands):
    # A rate that does not depend on run.steps, and batches that change both at a resumed step and after it.
    rate = ("optim.warmup_steps=0", "optim.min_lr=4e-3")
    constant = (*rate, "batch.schedule=[[500,12]]", "batch.length_schedule=[[0,24],[1000,48]]")
    commands.train("whole", *constant)
    commands.train("parts", *constant, "run.steps=2")
    resumed = commands.train("parts", *constant)
    assert "starting after step 2" in resumed and "expert load of the first batch" not in resumed
    assert commands.losses("parts") == commands.losses("whole")
    tokens = [0, 8 * 48, 16 * 48, 28 * 48, 40 * 48]
    assert [line["tokens"] for line in commands.metrics("parts")] == tokens[1:]
    assert "finished" in commands.train("parts", *constant)
    assert "model.experts=8 (was 16)" in commands.train("parts", "run.steps=9", "model.experts=8", code=2)
    output = commands.train("parts", *constant, "run.steps=5", processes=1)
    assert "going on with another layout: world 1 (was 2), expert 1 (was 2), data 1 (was 2)" in output
    assert commands.metrics("parts")[-1]["step"] == 5 and "starting after step 4" in output


@pytest.mark.timeout(1200)  # a dozen commands, each of which starts processes
def test_a_run_is_used_on_other_processes_than_it_was_trained_on(commands: Commands, tmp_path: Path, corpus: Path):
    long = ("run.steps=30", "run.log_every=30", "optim.warmup_steps=2")
    commands.train("run", *long, "parallel.expert=4", processes=4)
    last = commands.metrics("run")[-1]
    name = (f"run.dir={commands.runs}", "run=run")
    # The fewest that hold the model: one; then the experts over two; then each layer over two.
    for layout, processes in (((), None), ((), 2), (("parallel.tensor=2",), None)):
        output = commands.run("evaluate", *name, "samples=6", *layout, processes=processes)
        assert f"starting {processes or 1 + len(layout)} process" in output
        # Four decimals of the same number; sums over processes differ in the last bits of a float64.
        assert f"held-out lm_loss {last['heldout_lm_loss']:.4f}" in output
    # Its Hugging Face checkpoint too, read back as another run.
    commands.run("export", *name, f"out={tmp_path / 'hf'}", processes=None)
    back = (f"run.dir={commands.runs}", "run=back")
    commands.run("import", *back, f"hf={tmp_path / 'hf'}", f"corpus={corpus}", "seq_length=48", processes=None)
    output = commands.run("evaluate", *back, "samples=6", "draft=0", processes=1)
    assert f"held-out lm_loss {last['heldout_lm_loss']:.4f}" in output
    greedy = commands.run("generate", *name, "prompt=one two", "tokens=12", processes=1)
    assert greedy.splitlines()[-1].startswith("one two")
    assert commands.run("generate", *name, "prompt=one two", "tokens=12", processes=1) == greedy
    drafted = commands.run("generate", *name, "prompt=one two", "tokens=12", "draft=2", processes=2)
    assert greedy.splitlines()[-1] in drafted  # what is said of the drafts is on stderr, which comes when it comes
    assert "drafts of 2: " in drafted and " a pass" in drafted
    assert last["heldout_accepted_length"] >= 1.0
    path, few = commands.runs / "drafts.json", ("draft=3", "prompts=5", "prompt_tokens=9", "tokens=6", "samples=2")
    commands.run("evaluate", *name, *few, "needles=3", f"output={path}", processes=2)
    both = json.loads(path.read_text())
    together = both["drafts"]
    commands.run("evaluate", *name, *few, "needles=3", f"output={path}", processes=1)
    alone = json.loads(path.read_text())
    assert alone["drafts"] == together
    assert alone["metrics"] == pytest.approx(both["metrics"], rel=1e-5)  # sums in another order, in float32
    assert all(alone["metrics"][name] > 0 for name in ("heldout_needle_loss/at_50", "heldout_needle_first_loss/at_0"))
    assert any(name.startswith("heldout_lm_loss/documents_of_") for name in alone["metrics"])
    assert len(together["prompts"]) == len(together["texts"]) > 2 and len(together["cumulative"]) == 3
    commands.run("evaluate", *name, *few, f"output={path}", "dtype=bfloat16", processes=1)
    assert json.loads(path.read_text())["drafts"]["prompts"] == together["prompts"]
    assert "has no tokens" in commands.run("generate", *name, "prompt=", processes=1, code=2)
    (tmp_path / "prompt.txt").write_text("one two\n")
    assert commands.run("generate", *name, f"prompt_file={tmp_path / 'prompt.txt'}", "tokens=12", processes=1) == greedy
    other = commands.run("evaluate", *name, "samples=6", "draft=0", "data.seq_length=24", processes=1)
    assert "held-out lm_loss" in other and f"{last['heldout_lm_loss']:.4f}" not in other


def test_an_interleaved_pipeline_trains_evaluates_and_resumes(commands: Commands):
    stages = ("parallel.pipeline=2", "model.pattern=G|E|*|E", "parallel.recompute=full")
    # 30 samples in microbatches of 2 are 15, which two stages run two at a time.
    output = commands.train("piped", *stages, "run.steps=3", "run.eval_samples=30")
    assert "pipeline 2 (2 stages each)" in output
    commands.train("plain", "parallel.expert=1", "run.eval_samples=30", "run.steps=3")
    names = {"lm_loss", "mtp_loss/2", "grad_norm", "heldout_lm_loss", "heldout_unigram_entropy"}
    for piped, plain in zip(commands.metrics("piped"), commands.metrics("plain"), strict=True):
        expected = {name: plain[name] for name in names & plain.keys()}
        # Sums in another order, carried through three steps of AdamW, and a balance loss over other micro-batches.
        assert {name: piped[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert "starting after step 3" in commands.train("piped", *stages)
    heldout = commands.metrics("piped")[-1]["heldout_lm_loss"]
    name = (f"run.dir={commands.runs}", "run=piped")
    assert f"held-out lm_loss {heldout:.4f}" in commands.run("evaluate", *name, "samples=6", "parallel.pipeline=2")
    assert f"held-out lm_loss {heldout:.4f}" in commands.run("evaluate", *name, "samples=6", "draft=0", processes=None)
    refused = commands.run("generate", *name, "parallel.pipeline=2", processes=2, code=2)
    assert "generate needs all layers in one process" in refused


def test_ctrl_c_saves_and_the_run_goes_on(commands: Commands):
    process = commands.start(*commands.settings("run", "run.steps=5000", "run.log_every=1000"))
    for line in process.stdout:
        if line.startswith("step"):  # the first one
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 128 + signal.SIGINT, rest
    stopped = int(re.search(r"stopped after step (\d+) of 5000", rest)[1])
    last = ("run.log_every=1000", f"run.steps={stopped + 1}")
    assert f"starting after step {stopped}" in commands.train("run", *last)
    # Steps that were done and not logged before the stop are told of now.
    assert [len(line["every_step/lm_loss"]) for line in commands.metrics("run")] == [1, stopped]


def test_a_run_has_one_writer_saves_when_asked_and_leaves_no_worker_behind(commands: Commands):
    process = commands.start(*commands.settings("run", "run.steps=5000"))
    lines = iter(process.stdout.readline, "")
    next(line for line in lines if line.startswith("step"))
    refused = commands.train("run", code=2)
    assert "run.name=run is being trained by process" in refused and len(refused.splitlines()) == 1
    # Its stacks on demand, and it goes on.
    os.kill(json.loads((commands.runs / "run" / "heartbeat.json").read_text())["pid"], signal.SIGQUIT)
    assert next(line for line in lines if "most recent call first" in line)
    process.send_signal(signal.SIGUSR2)
    saved = next(line for line in lines if line.startswith("saved"))
    assert next(line for line in lines if line.startswith("step"))
    process.kill()
    process.communicate(timeout=60)  # the workers hold the pipe too: they are gone
    # SIGUSR1 stops the next one, which goes on from what was saved.
    process = commands.start(*commands.settings("run", "run.steps=5000"))
    lines = iter(process.stdout.readline, "")
    start = next(line for line in lines if line.startswith("starting after"))
    assert int(start.split()[-1]) == int(saved[-9:])
    next(line for line in lines if line.startswith("step"))
    process.send_signal(signal.SIGUSR1)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and "stopped after step" in rest


def test_max_time_ends_a_run_with_a_checkpoint(commands: Commands):
    output = commands.train("run", "run.max_time=0.00001", "balance.mode=exact", code=75)
    assert "stopped after step 1 of 4" in output
    assert "balance.mode=exact: a forward pass without the head ahead of each step, " in output
    assert (commands.runs / "run" / "checkpoints" / "step_00000001").is_dir()


def test_a_corrupt_shard_is_named_before_any_work(commands: Commands, tmp_path: Path, corpus: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(corpus).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    shard = broken / "train-00000-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    output = commands.train("run", f"data.corpus={broken}", code=2)
    assert "train-00000-00001.parquet" in output and "is corrupt" in output
    assert len(output.strip().splitlines()) == 1
    assert not (commands.runs / "run" / "metrics.jsonl").exists()


def test_choose() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert choose(logits, 0.0, torch.Generator()) == 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, 1.0, generator) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=3) / 4000
    # The standard deviation of a share of 4000 draws is under 0.008: three of them.
    torch.testing.assert_close(share, logits.softmax(0), atol=0.024, rtol=0)


def test_unigram_entropy() -> None:
    assert unigram_entropy(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(1.3862943611)
    assert unigram_entropy(torch.tensor([7, 0])) == 0.0


def test_in_groups_fills_up_with_padding() -> None:
    batches = [Batch(torch.full((2, 5), number), torch.zeros(2, 5, dtype=torch.int32)) for number in range(5)]
    groups = list(in_groups(batches, 2))
    assert [len(group) for group in groups] == [2, 2, 2]
    assert [batch for group in groups for batch in group][:5] == batches
    assert groups[2][1].num_samples == 0
    assert list(in_groups(batches, 1)) == [[batch] for batch in batches]


def test_due() -> None:
    assert [step for step in range(1, 8) if due(step, 3, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if due(step, 0, 7)] == [7]


def test_matmul_rate_is_a_rate() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e15
