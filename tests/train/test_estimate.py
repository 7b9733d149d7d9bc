"""What a recipe would cost: the numbers that the text shows, its mistakes, and that it needs neither torch nor data."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.cost import cost
from model.cost.cost import training_flops
from train.__main__ import compose, run
from train.job.footprint import footprint, planned_vocab, stage_numbers
from train.job.gpus import GPUS, data_sheet
from train.plan.estimate import Budget, check_budget, gpu_hours
from train.settings.run_checks import check_plan
from train.settings.tree import ConfigError

ROOT = Path(__file__).parents[2]


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
    config = compose(["-cn", "qwen3_32b"], planned=True)
    flops = training_flops(config.model, config.mtp, 151936, 4096)
    budget = Budget(tokens=36e12, gpu="H100", mfu=0.5, price=2.0)
    hours = 36e12 * flops / (989e12 * 0.5) / 3600
    assert gpu_hours(flops, budget) == pytest.approx(hours)
    arguments = ["estimate.tokens=36e12", "estimate.gpu=H100", "estimate.mfu=0.5"]
    text = said("-cn", "qwen3_32b", *arguments, "estimate.price=2")
    assert f"{hours:,.0f} GPU-hours = {hours * 2:,.0f} USD at 2 a GPU-hour; {hours / 64 / 24:,.1f} days" in text
    assert "USD" not in said("-cn", "qwen3_32b", *arguments)
    assert GPUS["B200"].peak > 2 * GPUS["H200"].peak and GPUS["H200"].memory > GPUS["H100"].memory


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
    assert sent[0] == sent[1] == sent[2] / 1.5


@pytest.mark.parametrize(("micro", "length", "gigabytes"), [(2, 4096, 136.9), (4, 4096, 143.8)])
def test_the_memory_of_whole_steps_is_what_was_measured(micro: int, length: int, gigabytes: float) -> None:
    """Peaks of whole training steps of `proxy` on one GPU, as tests/bench/RESULTS.md has them."""
    held = _proxy(micro, length)
    assert sum(held.values()) / 1e9 == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize(
    ("micro", "length", "gigabytes"),
    [(2, 4096, 29.7), (4, 4096, 31.2), (8, 4096, 35.9), (1, 32768, 35.9), (1, 65536, 52.0)],
)
def test_the_memory_of_forward_and_backward_is_what_was_measured(micro: int, length: int, gigabytes: float) -> None:
    """The same without engine: gradients come in the model's type, and all are there at the end of the pass."""
    held = _proxy(micro, length)
    begin = held["weights"] + held["activations"] + held["working space"]
    assert max(begin, 2 * held["weights"]) / 1e9 == pytest.approx(gigabytes, rel=0.1)


def _proxy(micro: int, length: int) -> dict[str, float]:
    sizes = [f"batch.micro={micro}", f"batch.global={micro}", f"data.seq_length={length}"]
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
    assert "balance.mode=exact" not in said("-cn", "qwen3_32b")


def test_data_sheets_are_found_by_the_names_that_devices_give_themselves() -> None:
    assert data_sheet("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert data_sheet("NVIDIA H200") is GPUS["H200"]
    assert data_sheet("NVIDIA B200") is GPUS["B200"]
    assert data_sheet("NVIDIA H100 PCIe") is data_sheet("NVIDIA H100 NVL") is data_sheet("NVIDIA A100") is None
