"""The doctor command: what this machine is, and whether it computes right."""

import platform
import shutil
import sys

import torch
import torch.distributed as dist

from train.job.build import gpu_or_cpu
from train.measure.checks import check_kernels, check_optimizer, driver_version, package_version
from train.measure.verdict import Kernels
from train.settings.run import Config

PACKAGES = (
    *("torch", "triton", "megatron-core", "flash-linear-attention", "tilelang", "flash-qla", "transformers"),
    *("transformer-engine", "deepspeed"),
)
LITTLE_DISK = 50  # gigabytes


def _cudnn() -> str:
    try:
        return str(torch.backends.cudnn.version())
    except RuntimeError as error:  # another package loaded another one than torch was built with
        return f"of no use to torch: {error}"


def facts(device: torch.device) -> list[str]:
    """Versions, GPU, collectives and disk, a line each."""
    free = shutil.disk_usage(".").free / 1e9
    backends = [
        name for name, there in (("NCCL", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there
    ]
    lines = [f"Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{package} {package_version(package)}" for package in PACKAGES]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        number = torch.cuda.device_count()
        lines.append(f"{number} x {properties.name}, {properties.total_memory / 1e9:.0f} GB, driver {driver_version()}")
        lines.append(f"CUDA {torch.version.cuda}, cuDNN {_cudnn()}")
    else:
        lines.append(f"no GPU; {torch.get_num_threads()} CPU threads")
    lines.append(f"collectives: {', '.join(backends)}")
    lines.append(f"disk: {free:.0f} GB free" + (", little for checkpoints" if free < LITTLE_DISK else ""))
    return lines


def run_doctor(config: Config) -> int:
    """The doctor command; 1 if anything is wrong. A training on this machine finds the verdict on its kernels."""
    device = gpu_or_cpu(config)
    print("\n".join(facts(device)))
    with Kernels(config, device, again=True) as kernels:
        wrong = kernels.compared(show=True) if kernels.needed else check_kernels(config.model, device)
    wrong += check_optimizer(config)
    if wrong:
        print(f"WRONG on this machine: {', '.join(wrong)}", file=sys.stderr)
        return 1
    print("all is well")
    return 0
