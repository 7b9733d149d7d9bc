"""Each patch of megatron-core is still needed: taken away alone, training or saving on a CPU asks for CUDA.

A failure here says that upstream no longer needs a patch, which can then go.
"""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from parallel import compat
from parallel import groups as process_groups
from parallel.topology import ParallelConfig
from tests.dist import run_ranks
from tests.parallel.tiny import MODEL, build_tiny, leave_layout, random_batch, start_engine, tiny_config
from train.job.build import Job
from train.job.checkpoint import load, save
from train.loop import train_step
from train.settings.run import BatchConfig, RunConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU megatron-core is used as it is")

ROWS = 4
P2P = "megatron.core.pipeline_parallel.p2p_communication"
REPLICAS = "megatron.core.dist_checkpointing.strategies.fully_parallel"
STAND_IN = compat._torch_on_cpu()
REPLACED = sorted(name for name in vars(STAND_IN) if not name.startswith("_") and name != "cuda")
REPLACED_CUDA = sorted(name for name in vars(STAND_IN.cuda) if not name.startswith("_"))


@contextlib.contextmanager
def _without_module(name: str) -> Iterator[None]:
    """One module sees the real torch."""
    module = importlib.import_module(name)
    stand_in, module.torch = module.torch, torch
    try:
        yield
    finally:
        module.torch = stand_in


@contextlib.contextmanager
def _without_name(name: str) -> Iterator[None]:
    """The stand-in answers one name as the real torch does."""
    torch_on_cpu = importlib.import_module(compat.CUDA_BOUND_MODULES[0]).torch
    names = vars(torch_on_cpu.cuda if name in REPLACED_CUDA else torch_on_cpu)
    replaced = names.pop(name)
    try:
        yield
    finally:
        names[name] = replaced


def _job(runs: Path, parallel: ParallelConfig = ParallelConfig(tensor=2)) -> Job:  # noqa: B008
    leave_layout()
    config = tiny_config(replace(MODEL, pattern="GE*E"), parallel, run=RunConfig("compat", str(runs)))
    return build_tiny(replace(config, batch=BatchConfig(ROWS, ROWS)))


def _train_and_save(runs: Path) -> None:
    """A step over two tensor-parallel ranks, a checkpoint, and the step after it."""
    job = _job(runs)
    engine = start_engine(job)
    train_step(job, engine, [random_batch(ROWS, seed=0)], lr=1e-3)
    load(engine, save(job, engine, 1, {}))
    train_step(job, engine, [random_batch(ROWS, seed=1)], lr=1e-3)


def _load_on_replicas(runs: Path) -> None:
    """A checkpoint into two data-parallel ranks, which send each other what both need."""
    job = _job(runs, ParallelConfig(expert=1))
    engine = start_engine(job)
    engine.sharded_state_dict(is_loading=True)  # AdamW has its moments, as after a step
    load(engine, save(job, engine, 1, {}))


def _load_with_devices_as_they_are(runs: Path) -> None:
    compat.loading_context, kept = contextlib.nullcontext, compat.loading_context
    try:
        _load_on_replicas(runs)
    finally:
        compat.loading_context = kept


def _send_round(runs: Path) -> None:
    """Each of two pipeline stages sends the other its rank."""
    rank = torch.distributed.get_rank()
    config = _job(runs).chunks[0].config
    config.pipeline_dtype = torch.float32
    ring = P2PCommunicator(torch.distributed.group.WORLD, config)
    received = ring.send_forward_recv_forward(torch.full((3,), float(rank)), recv_prev=True, tensor_shape=(3,))
    assert received.tolist() == [1.0 - rank] * 3


def _complaint(action: Callable, *args) -> str | None:
    try:
        action(*args)
    except (AssertionError, NameError, RuntimeError, TypeError) as error:
        return str(error)
    return None


def _clip_outside(runs: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    clip_grad_by_total_norm_fp32([parameter], 1.0, 2.0)


def _clip_inside(runs: Path) -> None:
    with compat.optimizer_context(torch.device("cpu")):
        _clip_outside(runs)


def _build_with_type_names_as_they_are(runs: Path) -> None:
    job = _job(runs)
    compat.optimizer_context, kept = lambda device: contextlib.nullcontext(), compat.optimizer_context
    try:
        start_engine(job)
    finally:
        compat.optimizer_context = kept


def _fused_adam(**settings) -> None:
    raise RuntimeError("FusedAdam asks for CUDA")


def _build_beside_transformer_engine(runs: Path, patched: bool) -> None:
    optimizer = importlib.import_module("megatron.core.optimizer")
    kept, kept_class, patch = optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam, compat.use_torch_adamw
    optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam = False, _fused_adam
    try:
        if not patched:
            compat.use_torch_adamw = lambda wanted: None
        start_engine(_job(runs))
    finally:
        optimizer.USING_PYTORCH_OPTIMIZER, optimizer.Adam, compat.use_torch_adamw = kept, kept_class, patch


def _without_sums(runs: Path) -> None:
    """megatron-core's own way of adding gradients to float32 sums."""
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    kept = vars(layers).pop("fused_weight_gradient_mlp_cuda")
    try:
        _train_and_save(runs)
    finally:
        layers.fused_weight_gradient_mlp_cuda = kept


def _take_away(runs: Path) -> dict[str, str | None]:
    """What is taken away -> how the CPU run then fails; None where it works."""
    process_groups.start(torch.device("cpu"))
    found = {"nothing": _complaint(_train_and_save, runs), "nothing, sending": _complaint(_send_round, runs)}
    for name in compat.CUDA_BOUND_MODULES:
        with _without_module(name):
            found[name] = _complaint({P2P: _send_round, REPLICAS: _load_on_replicas}.get(name, _train_and_save), runs)
    for name in REPLACED + REPLACED_CUDA:
        with _without_name(name):
            found[name] = _complaint(_train_and_save, runs)
    found["type names when building"] = _complaint(_build_with_type_names_as_they_are, runs)
    found["type names when clipping"] = _complaint(_clip_outside, runs)
    for name, patched in (("nothing, beside Transformer Engine", True), ("torch's AdamW", False)):
        found[name] = _complaint(_build_beside_transformer_engine, runs, patched)
    found["nothing, loading"] = _complaint(_load_on_replicas, runs)
    found["the device of exchanged parts"] = _complaint(_load_with_devices_as_they_are, runs)
    found["sums of gradients"] = _complaint(_without_sums, runs)
    found["nothing, clipping"] = _complaint(_clip_inside, runs)
    return found


@pytest.fixture(scope="module")
def complaints(tmp_path_factory) -> list[dict[str, str | None]]:
    return run_ranks(_take_away, 2, tmp_path_factory.mktemp("runs"), timeout=300)


WORKING = ["nothing", "nothing, sending", "nothing, loading", "nothing, clipping", "nothing, beside Transformer Engine"]


@pytest.mark.parametrize("what", WORKING)
def test_with_every_patch_it_works(complaints, what: str):
    assert [rank[what] for rank in complaints] == [None, None]


@pytest.mark.parametrize("name", [*compat.CUDA_BOUND_MODULES, *REPLACED, *REPLACED_CUDA])
def test_without_one_replacement_it_asks_for_cuda(complaints, name: str):
    for rank in complaints:
        assert rank[name] is not None, f"megatron-core no longer needs this: take {name} out of parallel/compat.py"
        # torch's two ways of refusing: no driver, or a build without CUDA.
        assert "NVIDIA" in rank[name] or "CUDA" in rank[name]


def test_without_torchs_adamw_it_takes_transformer_engines(complaints):
    for rank in complaints:
        assert "FusedAdam" in rank["torch's AdamW"], "megatron-core no longer chooses by what is installed"


def test_without_a_device_exchanged_parts_ask_for_cuda(complaints):
    for rank in complaints:
        found = rank["the device of exchanged parts"]
        assert found and ("NVIDIA" in found or "CUDA" in found), "megatron-core exchanges parts on their own device"


def test_without_sums_of_gradients_it_looks_for_apex(complaints):
    for rank in complaints:
        assert "fused_weight_gradient_mlp_cuda" in rank["sums of gradients"], "megatron-core has a way of its own"


def test_without_type_names_the_optimizer_refuses(complaints):
    for rank in complaints:
        assert "torch.cuda.FloatTensor" in rank["type names when building"]
        assert rank["type names when clipping"] is not None


def test_type_names():
    x = torch.zeros(2, dtype=torch.bfloat16)
    with compat.cuda_type_names():
        assert x.type() == "torch.cuda.BFloat16Tensor"
        assert x.type(torch.float32).dtype == torch.float32, "a conversion is left alone"
    assert x.type() == "torch.BFloat16Tensor"


def test_the_stand_in_is_torch_but_for_the_device():
    assert STAND_IN.tensor([1.5], device="cuda").device.type == "cpu"
    assert STAND_IN.zeros(2, device="meta").device.type == "meta"
    assert STAND_IN.cuda.current_device() == torch.device("cpu")
    assert STAND_IN.matmul is torch.matmul
    assert STAND_IN.cuda.is_available is torch.cuda.is_available


def _apply_for_a_gpu() -> list[bool]:
    compat.apply(torch.device("cuda", 0))
    return [importlib.import_module(name).torch is torch for name in compat.CUDA_BOUND_MODULES]


def test_nothing_is_patched_for_a_gpu():
    assert all(run_ranks(_apply_for_a_gpu, 1)[0])
    assert isinstance(compat.optimizer_context(torch.device("cuda")), contextlib.nullcontext)


def test_deepspeed_still_compiles_its_shared_memory_operation():
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: ./launch.sh setup deepspeed")
    backend = importlib.import_module("deepspeed.comm.torch")

    source = inspect.getsource(backend.build_shm_op)
    assert "__compatible_ops__" in source and "shm_comm_op" in inspect.getsource(backend.TorchBackend.__init__)
