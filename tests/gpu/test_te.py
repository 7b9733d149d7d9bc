"""Transformer Engine's linear layers beside torch's: the same model, and what FP8 rounds."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.backend import FP8, TE_LINEARS
from model.batch import MicroBatch, count_targets
from model.config import ModelConfig, MtpConfig
from model.network import LanguageModel
from model.stack import hybrid_config
from parallel import compat
from parallel import groups as process_groups
from parallel.engine import AdamW
from parallel.engine_megatron import MegatronEngine
from parallel.topology import Topology
from tests.model.helpers import randomise
from train.measure.checks import check_fp8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]
ROOT = Path(__file__).parents[2]
MTP = MtpConfig(steps=2)
# The widths of the recipe `small`, whose kernels the runs below have compiled then.
SHAPE = ModelConfig(
    pattern="GEG-GE*E",
    dtype="bfloat16",
    hidden_size=512,
    head_dim=128,
    linear_key_heads=4,
    linear_value_heads=8,
    linear_key_dim=128,
    linear_value_dim=128,
)
BACKENDS = {"torch": ("torch", "off"), "te": ("te", "off"), **{fp8: ("te", fp8) for fp8 in FP8}}
# The text that runs are compared on: three blocks of Gated DeltaNet and one of attention, of widths that FP8 takes.
# All runs read the same steps of 16,384 tokens: the more a step has, the less the order of a sum moves the next ones.
RUN = [
    "model=small",
    "model.repeats=1",
    "model.vocab_size=null",
    "data.seq_length=1024",
    "batch.global=16",
    "batch.micro=16",
    "run.log_every=1",
    "run.eval_samples=8",
    "run.eval_prompts=0",
    "wandb.mode=disabled",
]
STEPS, LAST = 200, 50
SWITCHED = ("torch", "block")


@pytest.fixture(scope="module")
def groups():
    compat.apply(torch.device("cuda"))
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield process_groups.lay_out(Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1))
    process_groups.stop()


@pytest.fixture(scope="module")
def networks(groups) -> dict[str, LanguageModel]:
    """The same weights in each backend."""
    with torch.device("cuda"):
        found = {
            name: LanguageModel(hybrid_config(replace(SHAPE, backend=backend, fp8=fp8), MTP), 512, groups)
            for name, (backend, fp8) in BACKENDS.items()
        }
    randomise(found["torch"])
    for network in found.values():
        network.load_state_dict(found["torch"].state_dict())
    return found


def a_batch(seed: int = 0) -> MicroBatch:
    tokens = torch.randint(0, 512, (4, 257), generator=torch.Generator().manual_seed(seed))
    documents = (torch.arange(257) > 100).long().expand(4, -1).clone()
    return MicroBatch.build(tokens, documents, count_targets(documents, MTP.steps)).to(torch.device("cuda"))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def results(network: LanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    losses = network(a_batch())
    losses.total.backward()
    return losses.by_step.detach(), {name: p.grad.clone() for name, p in network.named_parameters()}


def test_in_bfloat16_it_is_the_model_of_torch(networks) -> None:
    (expected, gradients), (found, others) = (results(networks[name]) for name in ("torch", "te"))
    # The same products in bfloat16 by another choice of cuBLAS's kernels: 8 bits of mantissa, through 8 layers. A token
    # that this tips to another expert is a good part of that expert's gradient; a wrong product is off by its size.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    errors = {name: relative_error(others[name], gradients[name]) for name in gradients if "experts." not in name}
    worst = max((error, name) for name, error in errors.items())
    print(f"te in bfloat16: losses {found.tolist()}, torch's {expected.tolist()}, worst gradient {worst}")
    assert worst[0] < 0.1, worst
    assert statistics.median(errors.values()) < 2e-2


@pytest.mark.parametrize("fp8", FP8)
def test_in_fp8_it_is_nearly_the_model_of_torch(networks, fp8: str) -> None:
    (expected, gradients), (found, others) = (results(networks[name]) for name in ("torch", fp8))
    errors = {name: relative_error(others[name], gradients[name]) for name in gradients}
    median = statistics.median(errors.values())
    print(f"{fp8}: losses {found.tolist()}, torch's {expected.tolist()}, median error of gradients {median}")
    # A product is off by 4 % (`train.measure.checks.FP8_TOLERANCE`, which each layer is held to by itself). Through 8
    # layers of large random weights that tips tokens to other experts; a wrong product shows as 1 or more.
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0)
    assert median < 0.6
    assert all(x.isfinite().all() for x in others.values())


def test_fp8_rounds_what_the_table_names_and_nothing_else(networks) -> None:
    from model.kernels.te import Linear

    seen = set()
    hooks = [
        module.register_forward_hook(lambda module, *_, name=name: seen.add((name.split(".")[-1], module.fp8)))
        for name, module in networks["block"].named_modules()
        if isinstance(module, Linear)
    ]
    networks["block"](a_batch())
    assert seen == {(name, True) for name in TE_LINEARS}
    for hook in hooks:
        hook.remove()
    others = [x for x in networks["block"].modules() if type(x).__module__.startswith("transformer_engine")]
    assert not others


def test_write_strengths_and_decays_are_not_rounded(networks) -> None:
    x = torch.randn(1024, 1, SHAPE.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layers = [networks[name].decoder.layers[0].self_attention.in_proj for name in ("te", "block")]
    outs = [layer(x)[0].unflatten(-1, (SHAPE.linear_key_heads, -1)) for layer in layers]
    wide = layers[1].wide
    # Sums of bfloat16 products, rounded once to 8 bits: 2^-9 for each way of adding them up.
    assert relative_error(outs[1][..., -wide:], outs[0][..., -wide:]) < 4e-3
    assert relative_error(outs[1][..., :-wide], outs[0][..., :-wide]) > 1e-2, "nothing was rounded"
    upstream = torch.zeros_like(outs[0])
    upstream[..., -wide:] = torch.randn_like(upstream[..., -wide:])
    grads = [
        torch.autograd.grad(out, [x, layer.weight], upstream.clone()) for out, layer in zip(outs, layers, strict=True)
    ]
    for found, expected in zip(grads[1], grads[0], strict=True):
        assert relative_error(found, expected) < 8e-3


@pytest.mark.parametrize("fp8", FP8)
def test_linear_layers_in_fp8_are_as_near_as_the_doctor_wants(fp8: str) -> None:
    assert check_fp8(replace(SHAPE, backend="te", fp8=fp8), torch.device("cuda"), show=True) == []


def test_gradients_go_into_the_sums_of_data_parallelism(networks, groups) -> None:
    norms = {}
    for name in ("torch", "te", "block"):
        with torch.device("cuda"):
            network = LanguageModel(hybrid_config(networks[name].config.shape, MTP), 512, groups)
        network.load_state_dict(networks["torch"].state_dict())
        adamw = AdamW((0.9, 0.95), 1e-8, 0.1, 1.0)
        engine = MegatronEngine([network], groups, adamw, torch.device("cuda"), lambda name: True)
        for balance in network.balances().values():
            balance.begin_step(recording=False)
        engine.compute_gradients([a_batch(0), a_batch(1)], 1024)
        theirs = {key: p for key, p in network.named_parameters() if key.split(".")[-2] in TE_LINEARS}
        norms[name] = {key: float(p.main_grad.norm()) for key, p in theirs.items()}
    for key, norm in norms["torch"].items():  # a sum left out or taken twice shows as half or twice
        assert norms["te"][key] == pytest.approx(norm, rel=5e-2), key
        assert norms["block"][key] == pytest.approx(norm, rel=0.3), key


class Run(NamedTuple):
    """One run: its backend, and whose last checkpoint it goes on from (`run.fork`), if any."""

    backend: str
    fork: str | None = None


def _start(directory: Path, name: str, run: Run, steps: int) -> subprocess.Popen:
    kind, fp8 = BACKENDS[run.backend]
    settings = [*RUN, f"model.backend={kind}", f"model.fp8={fp8}", f"run.steps={steps}", f"run.name={name}"]
    settings += [f"run.dir={directory}", f"data.cache={directory / f'cache_{name}'}"]
    settings += [f"run.fork={run.fork}@{STEPS}"] if run.fork else []
    command = [sys.executable, "-m", "train", "train", *settings]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _train(directory: Path, runs: dict[str, Run], steps: int) -> dict[str, dict[int, float]]:
    """The losses of runs at once on one GPU, by step."""
    processes = {name: _start(directory, name, run, steps) for name, run in runs.items()}
    losses = {}
    for name, process in processes.items():
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, f"{name}: {output[-3000:]}"
        metrics = map(json.loads, (directory / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = {one["step"]: one["lm_loss"] for one in metrics if "lm_loss" in one}
    return losses


@pytest.fixture(scope="module")
def text_runs(tmp_path_factory) -> tuple[Path, dict[str, dict[int, float]]]:
    directory = tmp_path_factory.mktemp("runs")
    return directory, _train(directory, {name: Run(name) for name in ("torch", "te", "block")}, STEPS)


@pytest.mark.timeout(600)
def test_two_hundred_steps_of_text_end_at_the_loss_of_torch(text_runs) -> None:
    ends = {name: statistics.mean(list(losses.values())[-LAST:]) for name, losses in text_runs[1].items()}
    print(f"mean loss of the last {LAST} of {STEPS} steps: {ends}")
    assert {len(losses) for losses in text_runs[1].values()} == {STEPS}
    for name in ("te", "block"):
        assert ends[name] == pytest.approx(ends["torch"], rel=5e-3), name


@pytest.mark.timeout(600)
def test_a_run_goes_on_with_another_backend(text_runs) -> None:
    """A checkpoint of either backend goes on with the other as it does with its own, over the same text."""
    directory, _ = text_runs
    runs = {f"{fork}_with_{backend}": Run(backend, fork) for fork in SWITCHED for backend in SWITCHED}
    found = _train(directory, runs, STEPS + 5)
    ends = {
        name: statistics.mean(losses[step] for step in range(STEPS + 1, STEPS + 6)) for name, losses in found.items()
    }
    print(f"mean loss of 5 steps with another backend: {ends}")
    for fork in SWITCHED:  # without the moments or the masters they would part
        with_torch, with_block = (ends[f"{fork}_with_{backend}"] for backend in SWITCHED)
        assert with_block == pytest.approx(with_torch, rel=1e-2), fork
