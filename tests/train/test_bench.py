"""The bench and doctor commands on a CPU, and what they must not call well."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from model.config import BalanceConfig, MtpConfig
from model.cost.cost import chain_flops, training_flops
from model.layers.experts import Experts
from model.layers.norm import ResidualRMSNorm, ZeroCentredRMSNorm
from model.stack import hybrid_config
from parallel.transport import stand_ins
from tests.model.helpers import SMALL
from train.__main__ import compose, run
from train.measure import checks, doctor
from train.measure.bench import Result, Timing, random_batches, results_page, run_bench
from train.measure.breakdown import Stopwatch, operations
from train.measure.peers import missing
from train.measure.timing import WARM_UP, run_steps
from train.settings.commands import BenchSettings
from train.settings.run import Config
from train.settings.tree import ConfigError


def test_bench_times_ours_and_the_peers(tmp_path, capfd: pytest.CaptureFixture) -> None:
    output = tmp_path / "deep" / "bench.json"
    sizes = ["data.seq_length=32", "model.vocab_size=128", "model.hidden_size=32", "mtp.steps=0"]
    arguments = [
        "bench",
        f"bench.output={output}",
        "bench.sequences=[1,2]",
        "bench.repeats=1",
        "bench.optimizer=true",
        'bench.also=["model.repeats=2 balance.forced=true"]',
        *sizes,
    ]
    assert run(arguments) == 0
    written, forced = json.loads(output.read_text()).values()
    assert "GEGEGE*E x 2" in forced["about"]["model"] and "forced" in forced["about"]["data"]
    assert [(timing["name"], timing["sequences"]) for timing in forced["timings"]] == [
        (name, sequences) for name in ("tessera", "48 layers, projected", "tessera, whole step") for sequences in (1, 2)
    ]
    page = output.with_suffix(".md").read_text()
    assert "## the recipe" in page and "## model.repeats=2 balance.forced=true" in page and "| routed experts |" in page
    found = [(timing["name"], timing["sequences"]) for timing in written["timings"]]
    contestants = ("tessera", "48 layers, projected", "tessera, whole step", "transformers")
    assert found == [(name, sequences) for name in contestants for sequences in (1, 2)]
    assert forced["left_out"]["transformers"] == "it has no forced routing"
    assert written["left_out"] == {"megatron-core with Transformer Engine": "transformer_engine is not installed"}
    for timing in written["timings"]:
        assert timing["tokens_per_second"] == pytest.approx(32e3 * timing["sequences"] / timing["milliseconds"])
    (one, row), parts = written["timings"][1:4:2], written["parts"]["2"]
    head = next(part["milliseconds"] for part in parts if part["name"] == "head and loss")
    assert row["milliseconds"] == pytest.approx(12 * (one["milliseconds"] - head) + head)
    assert row["tflops"] * row["milliseconds"] > 5 * one["tflops"] * one["milliseconds"]  # of twelve times the layers
    names = {part["name"] for part in parts}
    assert names > {"Gated DeltaNet", "attention", "router", "routed experts", "shared expert", "norms"}
    assert "CPU" in written["about"]["device"] and "CPU" in capfd.readouterr().out


def test_bench_times_a_layout_of_several_processes(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    output = tmp_path / "bench.json"
    sizes = ["data.seq_length=32", "model.vocab_size=128", "model.hidden_size=32", "mtp.steps=0"]
    own = [f"bench.output={output}", "bench.sequences=[1]", "bench.repeats=1", "bench.optimizer=true"]
    own += ["bench.project=0"]
    assert run(["bench", *own, *sizes, "parallel.expert=2", "batch.global=8"]) == 0
    (written,) = json.loads(output.read_text()).values()
    assert written["about"]["processes"].startswith("2 = ") and "experts over 2" in written["about"]["processes"]
    assert [timing["name"] for timing in written["timings"]] == ["tessera", "tessera, whole step"]  # bench.project=0
    assert set(written["left_out"].values()) == {"it is timed in one process only"}
    for timing in written["timings"]:  # of each process, which has a sequence of its own
        assert timing["tokens_per_second"] == pytest.approx(32e3 / timing["milliseconds"])
    assert capfd.readouterr().out.count("| tessera | 1 |") == 2  # as it goes, and in the report: by one process


def test_bench_times_one_process_of_a_layout_without_the_others(tmp_path: Path, monkeypatch, capfd) -> None:
    """An eighth of the experts on this process alone, which computes as many assignments as its tokens have."""
    received: list[float] = []
    forward = Experts.forward

    def counted(self: Experts, x: torch.Tensor, probs: torch.Tensor, *rest: object) -> torch.Tensor:
        received.append(len(probs) / (2 * 32 * self.config.shape.experts_per_token))
        assert self.local == self.config.shape.experts // 8 and x.isfinite().all() and len(x) <= len(probs)
        return forward(self, x, probs, *rest)

    monkeypatch.setattr(Experts, "forward", counted)
    configs = {"the recipe": compose(["model.vocab_size=128", "model.hidden_size=32", "data.seq_length=32"], True)}
    output = tmp_path / "bench.json"
    settings = BenchSettings(sequences=(2,), repeats=1, optimizer=True, as_first_of=8, output=str(output))
    assert run_bench(configs, settings) == 0
    (written,) = json.loads(output.read_text()).values()
    assert "ONE OF THEM" in written["about"]["processes"] and written["about"]["processes"].startswith("8 = ")
    ours, projected, step = written["timings"]
    assert projected["name"] == "48 layers, projected" and step["name"] == "tessera, whole step"
    assert ours["tokens_per_second"] == pytest.approx(64e3 / ours["milliseconds"])  # of this process
    # Others are made up to send as much as this one sends to its own part of the experts.
    assert 0.5 < sum(received) / len(received) < 2.0
    assert not torch.distributed.is_initialized()
    assert not stand_ins


def test_the_floors_are_of_what_a_process_computes() -> None:
    config = compose(["model.vocab_size=128", "data.seq_length=32", "mtp.steps=2"])
    found = operations(config, 128, 640)
    # All but the projections before the MTP layer, and what its later steps read of earlier ones.
    besides = 3 * (config.mtp.steps * 4 * config.model.hidden_size**2 + chain_flops(config.model, config.mtp))
    whole = training_flops(config.model, config.mtp, 128, 32)
    assert sum(found.values()) == pytest.approx(640 * (whole - besides))
    shared = compose(["model.vocab_size=128", "data.seq_length=32", "parallel.tensor=2", "parallel.context=2"])
    assert operations(shared, 128, 640) == pytest.approx({part: count / 4 for part, count in found.items()})


def test_data_parallel_ranks_are_timed_over_tokens_of_their_own() -> None:
    one, other = (random_batches(2, 16, 100, 1, part)[0] for part in range(2))
    assert one.shape == other.shape == (2, 17) and (one != other).any()
    assert torch.equal(one, random_batches(2, 16, 100, 1)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['bench.also=["parallel.tensor=2"]'], "is another layout"),
        (["model.pattern=GE|*E", "parallel.pipeline=2"], "parallel.pipeline=2 but bench"),
    ],
)
def test_bench_refuses_layouts_that_it_cannot_time(
    settings: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(ConfigError, match=message):
        run(["bench", *settings])


def test_the_table_counts_the_norms_of_layers_too() -> None:
    config = hybrid_config(SMALL, MtpConfig())
    norms = nn.ModuleList([ZeroCentredRMSNorm(config, 8, 1e-6), ResidualRMSNorm(config, 8, 1e-6)])
    watch = Stopwatch(norms, torch.device("cpu"))
    x = torch.randn(4, 8, requires_grad=True)
    normed, residual = norms[1](norms[0](x))
    (normed * residual).sum().backward()
    assert [len(pair) for pair in watch.marks[ZeroCentredRMSNorm]] == [2] * 4  # each forwards and backwards
    assert watch.take()[ZeroCentredRMSNorm] > 0


def test_a_peer_that_cannot_route_in_turn_is_left_out() -> None:
    plain = Config(mtp=MtpConfig(steps=0))
    assert missing("transformers", plain, 1) is None
    assert missing("transformers", Config(), 1) == "it is timed without multi-token prediction: mtp.steps=0"
    assert missing("transformers", replace(plain, balance=BalanceConfig(forced=True)), 1) == "it has no forced routing"


@pytest.mark.parametrize(
    "setting",
    ["bench.repeats=0", "bench.sequences=[]", "bench.sequences=[0,2]", "bench.size=3", 'bench.also=["bench.size"]'],
)
def test_bench_refuses_what_it_cannot_measure(setting: str) -> None:
    with pytest.raises(ConfigError, match="bench"):
        run(["bench", setting])


def test_steps_start_without_gradients_and_the_warm_up_does_not_count() -> None:
    weight = nn.Parameter(torch.ones(1))

    def step(x: torch.Tensor) -> None:
        assert weight.grad is None
        (weight * x).sum().backward()

    times = run_steps(step, [weight], [torch.ones(1)] * (WARM_UP + 3), torch.device("cpu"))
    assert len(times) == 3 and min(times) > 0 and weight.grad is None


def test_the_page_names_hardware_and_what_was_left_out() -> None:
    timing = Timing("tessera", 2, 71.9, 35.0, 114e3, 415.0, 0.53, 30.4)
    text = results_page(
        Result({"device": "a card"}, 778.0, [timing], left_out={"transformers at 8 sequences": "no memory"})
    )
    for part in ("device: a card", "114.0k tokens/s", "30.4 GB", "53% of matmul", "8 sequences: no memory"):
        assert part in text


def test_doctor_checks_a_recipes_kernels(capsys: pytest.CaptureFixture) -> None:
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("torch ", "gloo", "GB free", "delta rule, packed documents", "all is well"):
        assert part in text


def test_doctor_goes_on_where_torch_refuses_its_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> int:
        raise RuntimeError("cuDNN version incompatibility")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert doctor._cudnn() == "of no use to torch: cuDNN version incompatibility"


def test_doctor_fails_on_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(checks, "error", lambda case: 0.2 if case.name == "mixture" else 0.0)
    assert doctor.run_doctor(Config(model=SMALL)) == 1
    assert "mixture" in capsys.readouterr().err


def test_doctor_fails_on_a_wrong_optimizer_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_optimizer(Config()) == []
    for error, wrong in ((1e-7, []), (1e-2, ["the engine's AdamW"]), (float("nan"), ["the engine's AdamW"])):
        monkeypatch.setattr(checks, "optimizer_error", lambda config, error=error: error)
        assert checks.check_optimizer(Config()) == wrong
