"""The doctor command: what this machine is, and whether it computes right."""

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.preflight import TOLERANCE, cases, error
from model.rounding import linear_errors
from train.job.build import gpu_or_cpu, optimizer_error
from train.measure.compiling import compile_kernels
from train.settings.run import Config

PACKAGES = (
    *("torch", "triton", "megatron-core", "flash-linear-attention", "tilelang", "flash-qla", "transformers"),
    *("transformer-engine", "deepspeed"),
)
# FP8 keeps 3 bits of a number (2 of gradients, but in blocks): errors of 2^-4 (2^-3) at the most and a third of that on
# average, in both factors of a product, which sums of thousands leave as they are. A wrong scale or transposition is
# off by as much as the result.
FP8_TOLERANCE = 0.1
ADAM_TOLERANCE = 1e-5  # float32, a few operations
LITTLE_DISK = 50  # gigabytes


def package_version(package: str) -> str:
    """The installed version of a package, in words where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def driver_version() -> str:
    """The version of the GPU's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]


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


def check_kernels(shape: ModelConfig, device: torch.device, show: bool = True) -> list[str]:
    """Compares every kernel of a model with its twin, on the screen a line each; the names of the wrong ones.

    On a CPU what is checked is plain torch in float32.
    """
    wrong = []
    if show:
        print("kernels against their twins in float64, forwards and backwards:", flush=True)
    for case in cases(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32):
        found = error(case)
        if show:
            verdict = "right" if found <= TOLERANCE else f"WRONG: more than {TOLERANCE}"
            print(f"  {case.name:<32}error {found:.1e}  {verdict}", flush=True)
        if found > TOLERANCE:
            wrong.append(case.name)
    return wrong


def check_fp8(shape: ModelConfig, device: torch.device, show: bool = True) -> list[str]:
    """Compares each linear layer that is Transformer Engine's with its products in float64; the names of the wrong."""
    if shape.backend != "te":
        return []
    tolerance = TOLERANCE if shape.fp8 == "off" else FP8_TOLERANCE
    found = linear_errors(shape, device)
    if show:
        print(f"Transformer Engine (model.fp8={shape.fp8}) against float64, forwards and backwards:", flush=True)
        for name, error in found.items():
            verdict = "right" if error <= tolerance else f"WRONG: more than {tolerance}"
            print(f"  {name:<32}error {error:.1e}  {verdict}", flush=True)
    return [name for name, error in found.items() if not error <= tolerance]


def check_optimizer(config: Config) -> list[str]:
    """Compares an optimizer that the engine brings along with AdamW in float64; its name if it is wrong."""
    error = optimizer_error(config)
    if error is None:
        return []
    verdict = "right" if error <= ADAM_TOLERANCE else f"WRONG: more than {ADAM_TOLERANCE}"
    print(f"the engine's own AdamW against float64: error {error:.1e}  {verdict}", flush=True)
    return [] if error <= ADAM_TOLERANCE else ["the engine's AdamW"]


def run_doctor(config: Config) -> int:
    """The doctor command; 1 if anything is wrong."""
    device = gpu_or_cpu(config)
    print("\n".join(facts(device)))
    if device.type == "cuda":
        compile_kernels(config.model, device)
    wrong = check_kernels(config.model, device) + check_fp8(config.model, device) + check_optimizer(config)
    if wrong:
        print(f"WRONG on this machine: {', '.join(wrong)}", file=sys.stderr)
        return 1
    print("all is well")
    return 0
