"""Starting and ending the process groups of a job, and the device of this process."""

import ctypes
import datetime
import os
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel import compat
from parallel.domains import expert_domains
from parallel.topology import ParallelConfig, Topology

RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torchrun's word for how often it has started the workers anew
# The switch of torch's flight recorder, and how many collectives it keeps.
RECORDER, RECORDED = "TORCH_FR_BUFFER_SIZE", "2000"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # two names of one setting
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
# For the same bits each time: workspaces of cuBLAS that torch asks for (eight of 4 MiB), and tiles of Triton kernels
# that are chosen by timing once for all runs of a machine.
FIXED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TRITON_CACHE_AUTOTUNING": "1"}
BLACKWELL = 10  # compute capability
KERNEL_CACHES = {"TRITON_CACHE_DIR": "triton", "TILELANG_CACHE_DIR": "tilelang"}


def set_cuda_variables(parallel: ParallelConfig, deterministic: bool = False) -> None:
    """Sets what CUDA and torch's allocator read once, when they start. To be called before either has.

    Whoever starts the job may choose otherwise.
    """
    architecture = _architecture()
    if not architecture:
        return
    # Rows received by experts differ in number from layer to layer and step to step: blocks of fixed sizes would fall
    # to pieces.
    if not os.environ.keys() & set(ALLOCATOR):
        os.environ[ALLOCATOR[1]] = "expandable_segments:True"
    # The backward pass of tensor parallelism launches its collectives ahead of the products that hide them, and one
    # queue keeps that order (megatron-core's arguments ask for it, from Blackwell on no more). Without it several
    # queues are better: experts' exchanges overlap what is launched before them.
    if parallel.tensor > 1 and architecture < BLACKWELL:
        os.environ.setdefault(CONNECTIONS, "1")
    if deterministic:
        os.environ.update(FIXED | os.environ)


def set_kernel_caches(directory: str) -> None:
    """Where libraries keep the GPU kernels that they compile, each in a folder of its own.

    Whoever starts the job may choose otherwise.
    """
    for name, folder in KERNEL_CACHES.items():
        os.environ.setdefault(name, str(Path(directory).absolute() / folder))


def cuda_variables() -> str:
    """A line for the start of a run on GPUs: those variables, as they are."""
    names = (*ALLOCATOR, CONNECTIONS, *FIXED)
    return "on GPUs: " + ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)


def _architecture() -> int:
    """The first GPU's compute capability, 0 without one. NVML is asked, since any call of CUDA's would start it."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    refused = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
    refused = refused or nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    return 0 if refused else major.value


def local_device() -> torch.device:
    """This process's device: its own GPU when the machine has GPUs, else the CPU."""
    if torch.cuda.is_available():
        # A task of Slurm's may see its own GPU only.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def start(device: torch.device, timeout_minutes: float = 30) -> None:
    """Joins the job's processes (as torchrun names them) over NCCL on GPUs and gloo on CPUs.

    Args:
        timeout_minutes: after which a collective that some have not come to is given up.
    """
    compat.apply(device)
    os.environ.setdefault(RECORDER, RECORDED)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torchrun keeps one store for all its restarts, and gloo would find the addresses of processes that have died.
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"restart {os.environ.get(RESTARTS, 0)}", store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )


def set_timeout(minutes: float) -> None:
    """Gives every process group of this process another timeout, for the collectives that it starts from now on.

    megatron-core's own `update_pg_timeout` synchronises a GPU, and leaves out the group of all.
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=minutes), group)


def start_fake(rank: int, world: int) -> None:
    """Stands in for one process of a job whose others are not there: its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)


def lay_out(topology: Topology, timeout_minutes: float = 30) -> ProcessGroupCollection:
    """Builds megatron-core's process groups for a layout, and `parallel.domains`', with `start`'s timeout."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        virtual_pipeline_model_parallel_size=topology.virtual if topology.virtual > 1 else None,
        context_parallel_size=topology.context,
        expert_model_parallel_size=topology.expert,
        expert_tensor_parallel_size=topology.expert_tensor,
        create_gloo_process_groups=False,  # beside those of the job's own backend: nothing here uses them
        distributed_timeout_minutes=timeout_minutes,  # its type says int; it makes a timedelta of it
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.expert_domains = expert_domains(topology, datetime.timedelta(minutes=timeout_minutes))
    return groups


def stop() -> None:
    """Leaves the job."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
