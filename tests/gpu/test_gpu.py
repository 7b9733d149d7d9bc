"""The same code on a GPU: kernels against twins, the model against itself on the CPU, and the train command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.batch import MicroBatch, count_targets
from model.config import ModelConfig, MtpConfig
from model.documents import Documents
from model.layers.chain import chain_attention
from model.layers.experts import grouped_linear
from model.network import LanguageModel
from model.stack import hybrid_config
from parallel import groups as process_groups
from parallel.topology import Topology
from tests.model.helpers import randomise
from train.measure.checks import check_kernels

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
SHAPE, MTP = ModelConfig(), MtpConfig(steps=2)


@pytest.fixture(scope="module")
def groups():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield process_groups.lay_out(Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1))
    process_groups.stop()


def a_batch() -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 512, (4, 257), generator=generator)
    documents = (torch.arange(257) > 100).long() + (torch.arange(257) > 101).long()
    documents = documents.expand(4, -1).clone()
    documents[0] = 0
    return MicroBatch.build(tokens, documents, count_targets(documents, MTP.steps))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


QWEN3_NEXT = ModelConfig(
    hidden_size=2048, attention_heads=16, key_value_heads=2, head_dim=256, linear_key_heads=16, linear_value_heads=32,
    linear_key_dim=128, linear_value_dim=128, experts=512, experts_per_token=10, expert_size=512,
    shared_expert_size=512,
)  # fmt: skip


@pytest.mark.parametrize("shape", [SHAPE, QWEN3_NEXT], ids=["tiny", "Qwen3-Next"])
def test_every_kernel_equals_its_twin(shape: ModelConfig) -> None:
    assert check_kernels(shape, torch.device("cuda"), show=False) == []


@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_attention_over_a_prefix_and_a_chain_equals_the_cpu_in_float64(
    dtype: torch.dtype, tolerance: float, packed: bool
) -> None:
    rows, length, heads, groups, dim, chain = 2, 160, 4, 2, 64, 2
    ids = (torch.arange(length) > 70).long().expand(rows, -1) * packed
    generator = torch.Generator().manual_seed(2)
    sizes = [
        (rows * length, heads, dim),
        *[(rows * length, groups, dim)] * 2,
        *[(rows * length, chain, groups, dim)] * 2,
    ]
    leaves = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    upstream = torch.randn(sizes[0], generator=generator).to(dtype)
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        inputs = [x.to(device, kind).requires_grad_() for x in leaves]
        out = chain_attention(*inputs, Documents.from_ids(ids).to(torch.device(device)))
        out.backward(upstream.to(device, kind))
        results.append([out.detach(), *(x.grad for x in inputs)])
    # float32: sums in another order. bfloat16: 8 bits of mantissa, once for the output and once for each product.
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < tolerance


def test_grouped_linear_in_bfloat16_equals_a_loop_in_float64():
    counts = torch.tensor([5, 0, 64, 1, 0, 130, 7, 33])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(int(counts.sum()), 64, generator=generator).bfloat16()
    weight = torch.randn(8, 96, 64, generator=generator).bfloat16()
    upstream = torch.randn(x.shape[0], 96, generator=generator).bfloat16()
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
        out = grouped_linear(*leaves, counts.to(device))
        out.backward(upstream.to(device, dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    # Sums of bfloat16 products are rounded once to 8 bits of mantissa: 2^-9 relative at the most, a little for order.
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 4e-3


def losses_and_gradients(network: LanguageModel, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network.zero_grad()
    losses = network(a_batch().to(torch.device(device)))
    losses.total.backward()
    return losses.by_step.cpu(), {name: p.grad.cpu() for name, p in network.named_parameters()}


def test_the_model_on_a_gpu_equals_the_model_on_the_cpu(groups):
    on_cpu = LanguageModel(hybrid_config(SHAPE, MTP), 512, groups)
    randomise(on_cpu, 0)
    with torch.device("cuda"):
        on_gpu = LanguageModel(hybrid_config(SHAPE, MTP), 512, groups)
    on_gpu.load_state_dict(on_cpu.state_dict())
    expected, expected_gradients = losses_and_gradients(on_cpu, "cpu")
    found, gradients = losses_and_gradients(on_gpu, "cuda")
    # float32 without tf32 on both sides: only the order of sums differs, through 8 layers and 3 predictions.
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 2e-3, name


def test_bfloat16_keeps_its_float32_islands_and_its_losses(groups):
    with torch.device("cuda"):
        wide = LanguageModel(hybrid_config(SHAPE, MTP), 512, groups)
        narrow = LanguageModel(hybrid_config(ModelConfig(dtype="bfloat16"), MTP), 512, groups)
    randomise(wide, 0)
    narrow.load_state_dict(wide.state_dict())
    kept = {name.rsplit(".", 1)[-1] for name, p in narrow.named_parameters() if p.dtype == torch.float32}
    assert {"A_log", "dt_bias", "weight"} <= kept
    assert narrow.decoder.layers[1].mlp.router.weight.dtype == torch.float32
    assert narrow.decoder.layers[1].mlp.experts.weight1.dtype == torch.bfloat16
    expected, _ = losses_and_gradients(wide, "cuda")
    found, gradients = losses_and_gradients(narrow, "cuda")
    # 8 bits of mantissa give logits of order 1 errors of order 1e-2, which the mean over 1000 tokens averages out.
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_train_command_learns_and_resumes_on_a_gpu(dtype: str, tmp_path: Path):
    def train(steps: int) -> list[dict]:
        settings = [f"run.steps={steps}", f"model.dtype={dtype}", f"run.dir={tmp_path}", "run.log_every=10"]
        settings += ["wandb.mode=disabled", "run.name=gpu", f"data.cache={tmp_path / 'cache'}", "run.eval_every=0"]
        command = [sys.executable, "-m", "train", "train", *settings]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line) for line in (tmp_path / "gpu" / "metrics.jsonl").read_text().splitlines()]

    first = train(40)
    assert first[-1]["lm_loss"] < first[0]["lm_loss"] - 1.0
    longer = train(50)
    assert longer[-1]["step"] == 50
    assert longer[-1]["lm_loss"] < first[0]["lm_loss"] - 1.0
