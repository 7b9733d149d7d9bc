"""Backends: what they refuse, which linear layers are whose, and that a checkpoint does not tell them apart.

Transformer Engine itself runs on GPUs alone (tests/gpu/test_te.py). Here a stand-in with the constructor of its linear
layer takes its place, whose products are those of inputs and weights rounded to 8 bits.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model import backend
from model.backend import BACKENDS, FP8, TE_LINEARS, check_backend, check_fp8_sizes, linear_sizes, require_backend
from model.batch import MicroBatch, count_targets
from model.config import ModelConfig, ModelError, MtpConfig, OneProcess
from model.kernels import backends
from model.rounding import linear_errors
from model.stack import hybrid_config, stack_spec
from parallel import main_grads
from tests.model.helpers import SMALL
from train.measure.checks import FP8_TOLERANCE

TE = ModelConfig(backend="te", dtype="bfloat16", linear_key_heads=4, linear_value_heads=8)
BLOCK = replace(TE, fp8="block")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (ModelConfig(backend="jax"), "model.backend='jax' is not known: choose torch or te"),
        (replace(TE, fp8="mxfp8"), "model.fp8='mxfp8' is not known: choose off, block or current"),
        (ModelConfig(dtype="bfloat16", fp8="block"), "model.fp8=block is Transformer Engine's: set model.back"),
        (replace(BLOCK, dtype="float32"), "model.fp8=block rounds products of bfloat16 and model.dtype=float3"),
        (replace(TE, fp8="delayed"), "model.fp8='delayed' is not known: choose off, block or current"),
    ],
)
def test_what_cannot_be_built_is_refused(model: ModelConfig, says: str) -> None:
    with pytest.raises(ModelError) as refusal:
        check_backend(model)
    assert str(refusal.value).startswith(says) and "\n" not in str(refusal.value)


def test_what_can_be_built_is_not_refused() -> None:
    for model in (ModelConfig(), TE, *(replace(TE, fp8=fp8) for fp8 in FP8)):
        check_backend(model)
        check_fp8_sizes(model, OneProcess(), 4096)


def test_sizes_that_fp8_does_not_take_are_refused() -> None:
    check_fp8_sizes(replace(BLOCK, fp8="off"), OneProcess(), 4095)
    with pytest.raises(ModelError, match=r"batch.micro x data.seq_length gives a process 4100: choose a"):
        check_fp8_sizes(BLOCK, OneProcess(), 4100)
    with pytest.raises(ModelError, match=r"and linear_fc2 \(dense layer: down\) has 24 on a process"):
        check_fp8_sizes(replace(BLOCK, pattern="*-", dense_size=48), OneProcess(tensor=2), 4096)


def test_missing_parts_are_named_with_what_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    require_backend(ModelConfig())
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"which is not installed: ./launch.sh setup te, or model.backend=torch"):
        require_backend(TE)
    monkeypatch.setattr(backend, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model.backend=te needs a GPU, and there is none"):
        require_backend(TE)


def test_the_spec_gives_each_backend_its_linear_layers() -> None:
    assert tuple(backends.LINEARS) == BACKENDS
    for name, linears in backends.LINEARS.items():
        layers = stack_spec(name).submodules
        delta, attention = (x.submodules.self_attention.submodules for x in (layers.gdn_layer, layers.attention_layer))
        assert (delta.in_proj, delta.out_proj) == (linears.heads, linears.row)
        assert (attention.linear_qkv, attention.linear_proj) == (linears.column, linears.row)
        for layer, own in ((layers.mlp_layer, linears), (layers.moe_layer, backends.LINEARS["torch"])):
            parts = layer.submodules.mlp.keywords["submodules"]
            assert (parts.linear_fc1, parts.linear_fc2) == (own.column, own.row)
        (mtp,) = layers.mtp_block_spec.submodules.layer_specs
        assert mtp.submodules.eh_proj is backends.ReplicatedLinear


class Rounded(nn.Module):
    """The stand-in: products of what is rounded to 8 bits where `autocast` says so, its gradients likewise."""

    fp8 = False

    def __init__(self, rows_in: int, rows_out: int, *, init_method, params_dtype, device, sequence_parallel, **_):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows_out, rows_in, dtype=params_dtype, device=device))
        self.fuse_wgrad_accumulation, self.sequence_parallel = False, sequence_parallel
        init_method(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = (_round(y) if Rounded.fp8 else y for y in (x, self.weight))
        return nn.functional.linear(x, weight)

    def get_extra_state(self) -> dict:
        return {"amax": 1}


def _round(x: Tensor) -> Tensor:
    return x + (x.detach().to(torch.float8_e4m3fn).to(x.dtype) - x.detach())


@contextmanager
def _autocast(enabled: bool, recipe=None) -> Iterator[None]:
    before, Rounded.fp8 = Rounded.fp8, enabled
    yield
    Rounded.fp8 = before


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """`model.kernels.te` on the stand-in."""
    modules = {
        name: types.ModuleType(f"transformer_engine{name}") for name in ("", ".pytorch", ".pytorch.quantization")
    }
    vars(modules[".pytorch"]).update(Linear=Rounded, autocast=_autocast)
    state = types.SimpleNamespace(is_fp8_enabled=lambda: Rounded.fp8)
    vars(modules[".pytorch.quantization"]).update(FP8GlobalStateManager=state)
    vars(modules[""]).update(pytorch=modules[".pytorch"])
    for module in modules.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield importlib.import_module("model.kernels.te")
    del sys.modules["model.kernels.te"]


def test_a_checkpoint_does_not_tell_the_backends_apart(te, build: Callable, groups) -> None:
    ours, theirs = (
        build(replace(SMALL, pattern="G-*E", dtype="float32", backend=name), MtpConfig(steps=1)) for name in BACKENDS
    )
    found = {name.rsplit(".", 1)[-1] for name, module in theirs.named_modules() if isinstance(module, te.Linear)}
    assert found == set(TE_LINEARS)
    assert not [x for moe in theirs.moe_layers() for x in moe.modules() if isinstance(x, te.Linear)]
    assert isinstance(theirs.decoder.layers[0].self_attention.in_proj, te.HeadsLinear)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    entries = [x.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}) for x in (ours, theirs)]
    assert entries[0].keys() == entries[1].keys()
    for one, other in zip(entries[0].values(), entries[1].values(), strict=True):
        assert type(one) is type(other) and (one.key, one.global_shape) == (other.key, other.global_shape)
        assert one.global_offset == other.global_offset
    ours.load_state_dict(theirs.state_dict())
    documents = torch.zeros(2, 13, dtype=torch.int64)
    batch = MicroBatch.build(torch.arange(26).view(2, 13), documents, count_targets(documents, 1))
    expected, found = (float(network(batch).total.detach()) for network in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-6)  # without FP8: the same products


@pytest.fixture
def heads(te, groups) -> nn.Module:
    config = hybrid_config(replace(SMALL, dtype="float32", hidden_size=16), MtpConfig(steps=0), OneProcess())
    layer = te.HeadsLinear(*linear_sizes(config.shape)["in_proj"], config, groups.tp)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    layer.recipe = "block"
    return layer


@pytest.mark.parametrize("fused", [False, True], ids=["gradient of its own", "added to the sums"])
def test_write_strengths_and_decays_are_not_rounded(heads: nn.Module, fused: bool) -> None:
    x = torch.randn(32, 1, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    upstream = torch.randn(32, 1, heads.weight.shape[0], generator=torch.Generator().manual_seed(2))
    wide = torch.zeros(2, heads.per_head, dtype=torch.bool)
    wide[:, -heads.wide :] = True
    wide, exact = wide.flatten(), nn.functional.linear(x, heads.weight)
    if fused:
        heads.weight.main_grad = torch.full(heads.weight.shape, 2.0)
    out, _ = heads(x)
    torch.testing.assert_close(out[..., wide], exact[..., wide])
    assert not torch.isclose(out[..., ~wide], exact[..., ~wide], rtol=1e-4).all(), "nothing was rounded at all"
    (grad_x,) = torch.autograd.grad((exact * upstream * wide).sum(), x)
    out.backward(upstream * wide)  # flows back through the wide rows alone
    torch.testing.assert_close(x.grad, grad_x)
    expected = upstream.flatten(0, 1).t() @ x.detach().flatten(0, 1)
    # The stand-in knows nothing of main_grad: what is there beside two has come from the wide rows.
    found = heads.weight.main_grad - 2.0 if fused else heads.weight.grad
    torch.testing.assert_close(found[wide], expected[wide])
    assert not found[~wide].any()


def test_the_doctor_sees_how_far_rounded_products_are(te, groups) -> None:
    shape = replace(SMALL, pattern="G-*E", dtype="float32", backend="te", hidden_size=32)
    assert max(linear_errors(shape, torch.device("cpu")).values()) < 1e-5
    with _autocast(True):
        errors = linear_errors(shape, torch.device("cpu"))
    assert errors.keys() == set(TE_LINEARS)
    assert all(1e-2 < error < FP8_TOLERANCE for error in errors.values()), errors


def test_fp8_is_opened_again_for_what_is_computed_again_and_left_where_rows_do_not_fit(heads: nn.Module) -> None:
    x = torch.randn(32, 1, 16, generator=torch.Generator().manual_seed(1))
    few = x[:3]
    assert not torch.equal(heads(x)[0], nn.functional.linear(x, heads.weight))
    with torch.no_grad():
        torch.testing.assert_close(heads(few)[0], nn.functional.linear(few, heads.weight))
    assert isinstance(heads.context(x), type(_autocast(True)))
    with _autocast(True):
        assert isinstance(heads.context(x), nullcontext)


def test_data_parallelism_tells_them_to_add_to_its_sums(heads: nn.Module) -> None:
    main_grads.fuse(heads)
    assert heads.fuse_wgrad_accumulation is True
