"""What a machine computes, compared with float64: the kernels of a model, Transformer Engine's layers, an optimizer."""

import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from model.config import ModelConfig
from model.preflight import TOLERANCE, cases, error
from model.rounding import linear_errors
from train.job.build import optimizer_error
from train.settings.run import Config

# FP8 keeps 3 bits of a number (2 of gradients, but in blocks): errors of 2^-4 (2^-3) at the most and a third of that on
# average, in both factors of a product, which sums of thousands leave as they are. A wrong scale or transposition is
# off by as much as the result.
FP8_TOLERANCE = 0.1
ADAM_TOLERANCE = 1e-5  # float32, a few operations


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
