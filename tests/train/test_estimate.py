"""What a recipe would cost: the numbers that the text shows, its mistakes, and that it needs neither torch nor data."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.cost import cost
from model.cost.cost import training_flops
from train.__main__ import compose, run
from train.job.footprint import footprint, planned_vocab, stage_numbers
from train.job.gpus import GPUS, data_sheet
from train.plan.estimate import Budget, check_budget
from train.plan.step_time import machine_of, step_time
from train.settings.run_checks import check_plan
from train.settings.tree import ConfigError

ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "tests" / "bench" / "RESULTS.md").read_text()
FULL = "parallel.recompute=full"


@pytest.fixture
def said(capsys):
    """Runs `estimate` and returns what it printed."""

    def ask(*arguments: str) -> str:
        assert run(["estimate", *arguments]) == 0
        return capsys.readouterr().out

    return ask


def number(text: str, name: str) -> float:
    return float(re.search(rf"^ *{re.escape(name)} +([\d,.]+) ", text, re.MULTILINE)[1].replace(",", ""))


def test_qwen3_next_80b_a3b(said) -> None:
    text = said("-cn", "qwen3_next_80b_a3b")
    assert number(text, "total") == 79.674
    assert number(text, "active, of these") == 3.253
    assert number(text, "MTP layer, beside the total") == 1.650
    assert number(text, "usual rule") == 22.930
    assert number(text, "without MTP") == pytest.approx(23.156)
    assert "processes 64 = tensor 1 x pipeline 1 x context 1 x data 64; experts over 64" in text


def test_gpu_hours_and_money(said) -> None:
    config = compose(["-cn", "proxy"], planned=True)
    flops = training_flops(config.model, config.mtp, 151936, 4096)
    hours = 1e12 * flops / (989e12 * 0.5) / 3600  # one GPU sends nothing
    arguments = ["estimate.tokens=1e12", "estimate.gpu=H100", "estimate.mfu=0.5", "parallel.world=1"]
    text = said("-cn", "proxy", *arguments, "estimate.price=2")
    assert f"{hours:,.0f} GPU-hours = {hours * 2:,.0f} USD at 2 a GPU-hour; {hours / 24:,.1f} days on 1 GPUs" in text
    assert "50.0% of the peak over the whole step" in text
    assert "USD" not in said("-cn", "proxy", *arguments)
    assert GPUS["B200"].peak > 2 * GPUS["H200"].peak and GPUS["H200"].memory > GPUS["H100"].memory


def test_what_travels_unhidden_stands_in_the_time_and_the_gpu_hours(said) -> None:
    config = compose(["-cn", "qwen3_next_80b_a3b"], planned=True)
    topology, tokens = check_plan(config, 64), 1024 * 4096
    step = step_time(config, topology, 151936, [footprint(config, topology, 151936, 0)], machine_of("H200", 0.4))
    assert step.transfers["expert all-to-all"] > step.arithmetic / 2  # eight nodes share the experts
    text = said("-cn", "qwen3_next_80b_a3b", "estimate.tokens=1e12")
    rows = text[text.index("1e+12 tokens on") :]
    assert number(rows, "expert all-to-all") == pytest.approx(1e3 * step.transfers["expert all-to-all"], abs=1e-3)
    assert number(rows, "total") == pytest.approx(1e3 * step.seconds, abs=1e-3)
    assert f"  {1e12 / tokens * step.seconds * 64 / 3600:,.0f} GPU-hours; " in rows
    alone = replace(machine_of("H200", 0.4), node_bandwidth=1e30, network_bandwidth=1e30)
    places = [footprint(config, topology, 151936, 0)]
    assert step_time(config, topology, 151936, places, alone).seconds == pytest.approx(step.arithmetic)


def test_batches_that_grow_count_as_long_as_they_are_read(said) -> None:
    base = ["-cn", "qwen3_next_80b_a3b_512gpu", "estimate.gpu=H100"]

    def hours(*arguments: str) -> float:
        return float(re.search(r"  ([\d,.]+) GPU-hours", said(*base, *arguments))[1].replace(",", ""))

    grows = ["batch.global=512", "batch.schedule=[[10000000000,4096]]"]
    parts = hours("batch.global=512", "estimate.tokens=1e10"), hours("batch.global=4096", "estimate.tokens=3e10")
    assert parts[0] > 1.2 * parts[1] / 3  # few micro-batches wait longer for a pipeline
    assert hours(*grows, "estimate.tokens=4e10") == pytest.approx(sum(parts), abs=2)  # rounded to hours
    assert "of a step of 4096 sequences, with" in said(*base, *grows, "estimate.tokens=4e10")
    assert "of a step, with" in said(*base, *grows, "estimate.tokens=1e10")
    # Memory is that of the largest batch, of which a pipeline holds the most micro-batches.
    small, both, large = (
        footprint(config, check_plan(config, 512), 151936, 0).memory
        for config in (compose([*base[:2], *own], planned=True) for own in (grows[:1], grows, ["batch.global=4096"]))
    )
    assert small["activations"] < both["activations"] == large["activations"]


def test_both_ends_of_a_pipeline_sum_the_gradients_of_their_embedding() -> None:
    config = compose(["-cn", "qwen3_next_80b_a3b_512gpu"], planned=True)
    sent = [footprint(config, check_plan(config, 512), 151936, rank).traffic for rank in range(4)]
    assert [place.get("embedding all-reduce") for place in sent] == [151936 * 2048 * 4, None, None, 151936 * 2048 * 4]


def test_what_is_not_foreseen_of_fp8_is_said(said) -> None:
    recipe = ("-cn", "qwen3_next_80b_a3b", "model.backend=te")
    assert "model.fp8=block counts as bfloat16, in time and memory" in said(*recipe, "model.fp8=block")
    assert "counts as bfloat16" not in said(*recipe)


def test_the_disk_of_a_whole_run(said) -> None:
    line = next(x for x in said("-cn", "qwen3_next_80b_a3b").splitlines() if x.startswith("checkpoints:"))
    # 3,576,279 steps, of which every 100,000th stays, and the newest three; kept all, they would be 4 PB.
    assert "GB each; 3 newest and 35 for good are kept" in line
    size = float(line.split()[1].replace(",", ""))
    assert 1_100 < size < 1_200
    assert line.endswith(f"{39 * size / 1e3:,.3f} TB of disk at the end")


def test_the_published_comparison(said) -> None:
    text = said("-cn", "qwen3_next_80b_a3b", "estimate.compare=true")
    table = text[text.index("operations beside peers") :]
    # 15 / 36 of the tokens; operations a token 11.3 % of 32B's at 4k, those of 30B-A3B's.
    assert re.search(r"qwen3_32b +4096:.* 11\.3%; x 0\.417 tokens = +4\.7% \( 5\.2%\)", table)
    assert re.search(r"qwen3_32b +32768:.* 10\.7%; x 0\.417 tokens = +4\.5%", table)
    assert re.search(r"qwen3_30b_a3b +4096:.*100\.3%; x 0\.417 tokens = 41\.8%", table)
    assert "published 9.3% allows it 0.51 x" in table and "needs 4.48 x" in table
    assert "published 80.0% allows it 0.52 x" in table and "needs 0.52 x" in table
    assert "does not" in table


@pytest.mark.parametrize("recipe", ["tiny", "tiny_512e", "qwen3_30b_a3b", "qwen3_32b"])
def test_every_other_recipe(said, recipe: str) -> None:
    assert "GPU-hours" in said("-cn", recipe)


def test_stages_of_an_interleaved_pipeline() -> None:
    arguments = ["model.pattern=GE|GE|GE|*E", "parallel.pipeline=2", "batch.global=16", "batch.micro=2"]
    config = compose([*arguments, "parallel.world=4"])
    topology = check_plan(config, 4)
    assert [stage_numbers(topology, rank) for rank in (0, 1)] == [[0, 2], [1, 3]]
    vocab = planned_vocab(config, topology)
    first, last = (footprint(config, topology, vocab, rank) for rank in (0, 1))
    assert len(first.balance) == 4 and sum(first.balance) == pytest.approx(1)
    assert first.balance[3] > 0.5  # head and MTP
    assert first.bubble == pytest.approx(0.5 / (4 + 0.5))
    assert last.memory["working space"] > first.memory["working space"]
    assert first.traffic["pipeline sends"] > 0


def test_recomputation_keeps_less_and_sends_more() -> None:
    kept, sent = [], []
    for policy in ("none", "selective", "full"):
        config = compose(["-cn", "qwen3_next_80b_a3b", f"parallel.recompute={policy}"], planned=True)
        place = footprint(config, check_plan(config, 64), 151936, 0)
        kept.append(place.memory["activations"])
        sent.append(place.traffic["expert all-to-all"])
    # Kernels keep little that selective recomputation could spare beside rows that came from elsewhere.
    assert kept[0] > 1.4 * kept[1] > 1.4 * 2 * kept[2]
    assert sent[0] == sent[1] == pytest.approx(sent[2] / 1.5)


def test_the_memory_of_whole_steps_is_what_was_measured() -> None:
    """Peaks of whole training steps of `proxy` on one GPU, as tests/bench/RESULTS.md has them."""
    row = re.search(r"natural routing .* ms at 2 sequences and ([\d.]+) GB, .* ms at 4 and ([\d.]+) GB", RESULTS)
    for micro, gigabytes in zip((2, 4), row.groups(), strict=True):
        assert sum(proxy(micro, 4096).values()) / 1e9 == pytest.approx(float(gigabytes), rel=0.1)


def test_half_the_optimizers_state_is_half_its_bytes() -> None:
    whole, half = (proxy(2, 4096, f"optim.moments={moments}")["optimizer"] for moments in ("float32", "bfloat16"))
    # Routers and norms are float32, which Transformer Engine's AdamW copies.
    assert whole * 0.5 < half < whole * 0.502


def peaks(header: str) -> dict[str, float]:
    """GB at the peak of our rows of a table of tests/bench/RESULTS.md, by its column of sequences."""
    _, _, *rows = RESULTS[RESULTS.index(header) :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "GB |" in row]
    ours = [row for row in cells if row[0] == "tessera" or " x " in row[0]]
    return {
        row[row[0] == "tessera"]: float(next(cell for cell in row if cell.endswith(" GB")).removesuffix(" GB"))
        for row in ours
    }


@pytest.mark.parametrize(
    ("header", "changes", "rows"),
    [
        ("| four blocks | sequences", (), 3),
        ("| twelve blocks, 20.4 B parameters | sequences", ("model.repeats=3",), 3),
        ("| four blocks | step", (), 3),  # one long sequence, the 131,072 tokens with layers computed again
    ],
)
def test_the_memory_of_forward_and_backward_is_what_was_measured(
    header: str, changes: tuple[str, ...], rows: int
) -> None:
    """The same without engine: gradients come in the model's type, and all are there at the end of the pass.

    Of expert parallelism nothing has been measured since a token is sent once to each process, and nothing yet of
    context parallelism.
    """
    found = peaks(header)
    assert len(found) == rows
    for name, gigabytes in found.items():
        micro, _, length = name.partition(" x ")
        length, again = re.match(r"([\d,]*)(.*recompute=full)?", length).groups()
        held = proxy(int(micro), int(length.replace(",", "") or 4096), *changes, *[FULL] * bool(again))
        begin = sum(held[part] for part in ("weights", "activations", "working space", "a layer computed again"))
        assert max(begin, 2 * held["weights"]) / 1e9 == pytest.approx(gigabytes, rel=0.1), name


def proxy(micro: int, length: int, *changes: str) -> dict[str, float]:
    sizes = [f"batch.micro={micro}", f"batch.global={micro}", f"data.seq_length={length}", *changes]
    config = compose(["-cn", "proxy", *sizes], planned=True)
    return footprint(config, check_plan(config, 1), 151936, 0).memory


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        (Budget(gpu="A100"), "estimate.gpu='A100' is not known: choose H100, H200, B200"),
        (Budget(tokens=-1.0), "estimate.tokens=-1.0 must be a number of tokens, or 0 for those of the run"),
        (Budget(mfu=40.0), "estimate.mfu=40.0 must lie above 0 and not above 1"),
        (Budget(price=-1.0), "estimate.price=-1.0 must be at least 0, or null"),
    ],
)
def test_mistakes_are_refused_with_one_line(budget: Budget, complaint: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_budget(budget)
    assert str(refusal.value) == complaint


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting estimate\.gpus=H100: did you mean estimate\.gpu\?"):
        run(["estimate", "estimate.gpus=H100"])


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from train.__main__ import run; run(['estimate', '-cn', 'qwen3_next_80b_a3b']);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_what_counting_ahead_costs(said) -> None:
    """A forward pass without the head: its operations over three passes with it."""
    config = compose(["-cn", "qwen3_next_80b_a3b"], planned=True)
    parts = cost.forward_flops(config.model, config.mtp, 151936, 4096)
    share = (sum(parts.values()) - parts[cost.HEAD]) / (3 * sum(parts.values()))
    text = said("-cn", "qwen3_next_80b_a3b", "batch.global=1024", "batch.micro=4")
    # 48 mixtures and one MTP step, 512 experts, 1024 / 64 / 4 = 4 micro-batches, 8 bytes, this process's and the sums.
    assert f"{share:.1%} more operations; it keeps {49 * 512 * 4 * 8 * 2 / 2**20:.2f} MiB of counts" in text
    assert "balance.mode=exact" not in said("-cn", "qwen3_next_80b_a3b", "batch.global=256", "batch.micro=4")
    # Where it is chosen, its time and its exchanges stand in those of a step.
    steps = []
    for mode in ("online", "exact"):
        own = [f"balance.mode={mode}", "parallel.recompute=none"]
        config = compose(["-cn", "qwen3_next_80b_a3b", *own], planned=True)
        topology, machine = check_plan(config, 64), machine_of("H200", 0.4)
        place = footprint(config, topology, 151936, 0)
        steps.append((step_time(config, topology, 151936, [place], machine), place.traffic["expert all-to-all"]))
    (plain, sent), (exact, more) = steps
    assert exact.arithmetic == pytest.approx(plain.arithmetic * (1 + share)) and more == pytest.approx(1.5 * sent)
    assert "balance.mode=exact" not in said("-cn", "qwen3_32b")


def test_data_sheets_are_found_by_the_names_that_devices_give_themselves() -> None:
    assert data_sheet("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert data_sheet("NVIDIA H200") is GPUS["H200"]
    assert data_sheet("NVIDIA B200") is GPUS["B200"]
    assert data_sheet("NVIDIA H100 PCIe") is data_sheet("NVIDIA H100 NVL") is data_sheet("NVIDIA A100") is None
