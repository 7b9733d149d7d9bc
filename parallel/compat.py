"""Every patch of megatron-core and DeepSpeed, one function each: the symbol, the versions, the reason.

All but `use_torch_adamw`, `sum_gradients`, `read_with` and those of DeepSpeed let megatron-core 0.19 run
without CUDA, and none of these is applied with a GPU.
`tests/parallel/test_compat.py` holds a test for each that fails once upstream no longer needs the patch.
"""

import contextlib
import importlib
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parallel.main_grads import add_weight_gradient

# megatron-core modules on our path that name the "cuda" device outright (0.19.2).
CUDA_BOUND_MODULES = (
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.utils",
)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def build(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return build


class _Delegate(types.ModuleType):
    """A module that answers like another one, but for the names set on it."""

    def __init__(self, original: types.ModuleType, **replaced: Any) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _torch_on_cpu() -> types.ModuleType:
    """`torch` as one megatron-core module sees it: the CPU is the current device, and what asks for "cuda" gets it."""
    cuda = _Delegate(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda device=None: None,
        current_stream=lambda: None,
    )
    factories = {f.__name__: _on_cpu(f) for f in (torch.tensor, torch.zeros)}
    return _Delegate(torch, cuda=cuda, **factories)


def replace_cuda_device() -> None:
    """Symbols: `torch` in CUDA_BOUND_MODULES, 0.19.x. Reason: `device="cuda"` and `torch.cuda.current_device()`."""
    replacement = _torch_on_cpu()
    for name in CUDA_BOUND_MODULES:
        module: Any = importlib.import_module(name)
        module.torch = replacement


class cuda_type_names(TorchFunctionMode):
    """Symbols: `Tensor.type()` in `DistributedOptimizer` and `clip_grad_by_total_norm_fp32`, 0.19.x.

    Reason: they compare with names such as "torch.cuda.FloatTensor". Inside this context CPU tensors answer so.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def optimizer_context(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where megatron-core's optimizer is built and stepped: see `cuda_type_names`."""
    return cuda_type_names() if device.type == "cpu" else contextlib.nullcontext()


class cuda_is_the_cpu(TorchFunctionMode):
    """Symbols: `Tensor.cuda()` in `exchange_utils`, `torch.empty` in `ShardedTensor.init_data`, 0.19.x.

    Reason: parts of a checkpoint that are sent to other ranks travel by way of "cuda". Inside this context the CPU is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        return _on_cpu(func)(*args, **(kwargs or {}))


def loading_context() -> contextlib.AbstractContextManager[Any]:
    """Where megatron-core loads a checkpoint: see `cuda_is_the_cpu`."""
    return contextlib.nullcontext() if torch.cuda.is_available() else cuda_is_the_cpu()


def read_with(reader: Callable[[Any], Any]) -> None:
    """Symbols: `_get_filesystem_reader` in `strategies.torch` and `serialization`, `_legacy_common_state_exists` of
    the latter, 0.19.x.

    Reason: PyTorch's reader runs the pickles in a checkpoint, and megatron-core lets nobody choose another one. Nor is
    `common.pt` read, a pickle of older formats that no checkpoint of ours has.
    """
    for name in ("strategies.torch", "serialization"):
        module: Any = importlib.import_module(f"megatron.core.dist_checkpointing.{name}")
        module._get_filesystem_reader = lambda checkpoint, **_: reader(checkpoint)
    module._legacy_common_state_exists = lambda checkpoint: False


def use_torch_adamw(wanted: bool) -> None:
    """Symbol: `megatron.core.optimizer.USING_PYTORCH_OPTIMIZER`, 0.19.x.

    Reason: where Transformer Engine is installed megatron-core takes its FusedAdam, which needs CUDA. What is installed
    must not decide how a run trains: a setting does.
    """
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    optimizer.USING_PYTORCH_OPTIMIZER = wanted


def sum_gradients() -> None:
    """Symbol: `megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda`, 0.19.x.

    Reason: its linear layers add gradients to float32 sums by an extension of APEX, which is built from its source;
    torch does the same.
    """
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)


def leave_out_shared_memory() -> None:
    """Symbol: `deepspeed.ops.__compatible_ops__`, 0.19.x.

    Reason: on CPUs DeepSpeed compiles an all-reduce for inference when it is first started, a minute's work that no
    training calls.
    """
    operations: Any = importlib.import_module("deepspeed.ops")
    operations.__compatible_ops__["deepspeed_shm_comm"] = False


def ask_before_steps(zero: Any, stage: int, is_accepted: Callable[[float], bool]) -> None:
    """Symbols: `scaled_global_norm` of DeepSpeed's ZeRO 1 and 2, `_get_norm_groups` of its ZeRO 3, 0.19.x.

    Reason: between the norm of all gradients and the step nobody is asked. A norm that is not finite makes both leave
    the step out, so that is what they are told of a step that is not accepted. Of a bfloat16 model whose types are its
    own ZeRO 1 and 2 would take even such a step, so they are also told what they would have found out.
    """
    original = zero._get_norm_groups if stage == 3 else zero.scaled_global_norm

    def judged() -> Any:
        norm = original()
        squares = [float(one) ** 2 if float(one) >= 0 else math.inf for one in (norm if stage == 3 else [norm])]
        whole = math.sqrt(sum(squares))
        if is_accepted(whole if math.isfinite(whole) else math.inf) and math.isfinite(whole):
            return norm
        zero.overflow, refused = True, torch.tensor(math.inf)
        return [refused] if stage == 3 else refused

    if stage == 3:
        zero._get_norm_groups = judged
    else:
        zero.scaled_global_norm = judged


def send_gradients_to_the_host(zero: Any) -> None:
    """Symbols: `_use_compact_grad_partition_buffer`, `copy_grads_in_partition` and
    `_finalize_cpu_offload_gradient_accumulation` of DeepSpeed's ZeRO 2 with its optimizer in the host's memory, 0.19.x.

    Reason: of a model that has chosen its own types ZeRO keeps a float32 gradient of every number on the GPU until the
    step: 4 bytes beside the 2 of a weight, which is what offload is there to save. Here a reduced gradient is added
    to the float32 one that the optimizer has in the host's memory, and let go.
    """

    def add(parameter: Any, _: int) -> None:
        key = zero.get_param_id(parameter)
        group, first, place, numel = zero.grad_position[key]
        total = zero.single_partition_of_fp32_groups[group].grad.narrow(0, place, numel)
        part = parameter.grad.detach().flatten().narrow(0, first, numel).float()
        if key in zero._offload_accumulated_param_ids:  # of an earlier micro-batch; a step forgets them
            part = part + total.to(part.device)
        total.copy_(part)
        zero._offload_accumulated_param_ids.add(key)
        zero.norm_for_param_grads[key] = torch.linalg.vector_norm(part, dtype=torch.float64)
        zero.clear_grad_attribute(parameter)

    zero._use_compact_grad_partition_buffer = lambda group: False
    zero.copy_grads_in_partition = add
    zero._finalize_cpu_offload_gradient_accumulation = lambda: None
    # Gradients do not pass through these any more; each is as large as the largest parameter.
    zero.temp_grad_buffer_for_cpu_offload = zero.temp_grad_buffer_for_gpu_offload = None


def note_before_steps(zero: Any, note: Callable[[int], None]) -> None:
    """Symbol: `_optimizer_step` of DeepSpeed's ZeRO 1, 2 and 3, 0.19.x.

    Reason: the gradients that a group's step takes are gone when the step is over. ``note`` gets the group's number
    before it.
    """
    original = zero._optimizer_step

    def noted(group: int) -> None:
        note(group)
        original(group)

    zero._optimizer_step = noted


def apply(device: torch.device) -> None:
    """Applies what this device needs, once per process and before the engine is built."""
    sum_gradients()
    if device.type == "cpu":
        replace_cuda_device()
