"""Every Triton kernel in Triton's interpreter on the CPU, against its twin.

Run by `test_kernels` in a process of its own, since the interpreter is chosen when Triton is imported.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from model import preflight
from model.batch import MicroBatch, count_targets
from model.config import MtpConfig
from model.kernels import grouped
from model.kernels.grouped import GradientTile, Tile
from model.layers import attention, deltanet, dense, experts, norm, router
from model.layers.norm import rms_norm_with_residual
from model.network import LanguageModel
from model.stack import hybrid_config
from parallel import groups as process_groups
from parallel.topology import Topology
from tests.model.helpers import SMALL, randomise

# These call a library's GPU kernels; only tests/gpu and the preflight see them.
LIBRARIES = {
    "gated_delta_rule",
    "packed_attention",
    "prefix_attention",
    "prefix_gradients",
    "router_logits",
    "add_product",
    "add_weight_gradient",
}
SHAPES = {
    "grouped": replace(SMALL, expert_size=12),
    "plain": replace(SMALL, attention_gate=False, linear_value_heads=2, hidden_size=20, expert_size=8, conv_kernel=3),
}
# The kernels sum in float32 what the twins sum in float64: 2^-24 times a few terms, against 1e-2 for a wrong index.
TOLERANCE = 2e-6


# Which names of which modules are functions with Triton kernels.
ACCELERATED = {
    attention: ("prepare_heads", "gate_heads"),
    deltanet: ("prepare_delta",),
    experts: ("fused_moe", "gate_rows"),
    dense: ("swiglu_pairs",),
    norm: ("zero_centred_rms_norm", "rms_norm_with_residual", "gated_rms_norm"),
    router: ("route",),
}
FEW = preflight.Sizes(length=12, vocab=40)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_triton_kernels_equal_their_twins(shape) -> None:
    cases = preflight.cases(shape, torch.device("cpu"), torch.float32, FEW)
    errors = {
        case.name: preflight.error(case, case.function.kernel())
        for case in cases
        if case.function.__name__ not in LIBRARIES
    }
    assert len(errors) == 17
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize(
    ("tile", "gradient"),
    [
        (Tile(32, 16, 16, 16, 4, 2), GradientTile(32, 16, 16, 4, 2)),
        (Tile(16, 0, 32, 16, 4, 2), GradientTile(16, 32, 32, 4, 2)),
    ],
    ids=["48 rows", "16 rows"],
)
def test_products_of_experts_are_the_same_in_every_tile(tile, gradient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tile's rows are two products, and experts end in the first or the second of them."""
    monkeypatch.setattr(grouped, "product_tile", lambda rows, experts: tile)
    monkeypatch.setattr(grouped, "gradient_tile", lambda rows, experts: gradient)
    cases = preflight.expert_cases(SHAPES["grouped"], torch.device("cpu"), torch.float32, preflight.Sizes(length=40))
    for case in cases:
        if case.name in ("gradients into sums", "mixture"):
            assert preflight.error(case, case.function.kernel()) <= TOLERANCE


def test_a_wrong_kernel_is_found() -> None:
    case = preflight.layer_cases(SMALL, torch.device("cpu"), torch.float32, FEW)[0]
    right = case.function.kernel()
    assert preflight.error(case, lambda x, weight, eps: right(x, weight + 0.1, eps)) > preflight.TOLERANCE
    assert preflight.error(case, lambda x, weight, eps: right(x, weight, eps) * float("nan")) == float("inf")


def strided(seed: int) -> torch.Tensor:
    """[9, 20] of which neither rows nor columns lie side by side."""
    return torch.randn(20, 18, generator=torch.Generator().manual_seed(seed))[:, ::2].T


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "norm", "residual"])
def test_a_residual_sends_its_gradient_through_the_norm(used: tuple[int, ...], recomputed: bool) -> None:
    """Whichever result is used, whatever the strides, and where the norm is computed again."""
    kernel, gradients = rms_norm_with_residual.kernel(), []
    for function, dtype in ((kernel, torch.float32), (rms_norm_with_residual.__wrapped__, torch.float64)):
        x, weight = (x.to(dtype).requires_grad_() for x in (strided(0), strided(1)[0].contiguous()))
        apply = partial(checkpoint, function, use_reentrant=True) if recomputed else function
        results = apply(x, weight, 1e-6)
        assert torch.equal(results[1], x)
        torch.autograd.backward([results[i] for i in used], [strided(2 + i).to(dtype) for i in used])
        gradients.append((x.grad, weight.grad))
    for found, expected in zip(*gradients, strict=True):
        if expected is None:
            assert found is None
        else:
            assert float((found - expected).norm()) <= TOLERANCE * float(expected.norm())


def test_a_residual_is_the_input_and_cannot_be_changed_in_place() -> None:
    x, weight = strided(0).requires_grad_(), torch.zeros(20, requires_grad=True)
    _, residual = rms_norm_with_residual.kernel()(x, weight, 1e-6)
    assert residual.data_ptr() == x.data_ptr() and residual.stride() == x.stride()
    with pytest.raises(RuntimeError, match="modified inplace"):
        residual.add_(1)


def test_modules_on_kernels_are_called_before_their_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core waits for the weights of other ranks before a call of the module that has them, and only then."""
    for module, names in ACCELERATED.items():
        for name in names:
            monkeypatch.setattr(module, name, vars(module)[name].kernel())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = process_groups.lay_out(Topology(world=1, tensor=1, pipeline=1, context=1, expert=1, data=1))
        network = LanguageModel(
            hybrid_config(replace(SMALL, dtype="float32", expert_size=12), MtpConfig(steps=1)), 64, groups
        )
        randomise(network)
        called: set[str] = set()
        owners = {name for name, module in network.named_modules() if list(module.parameters(recurse=False))}
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        tokens = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(0))
        documents = torch.zeros_like(tokens)
        network(MicroBatch.build(tokens, documents, count_targets(documents, 1)))
        assert {name.rsplit(".", 1)[-1] for name in owners} >= {"q_layernorm", "k_layernorm", "experts", "in_proj"}
        assert owners <= called, owners - called
    finally:
        process_groups.stop()
