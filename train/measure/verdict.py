"""The check of GPU kernels at the start of training: made once for a kind of machine, and its verdict kept.

A verdict holds for the same GPU, driver, versions, sources and sizes, and lies beside the compiled kernels
(`run.kernel_cache`), so that a second start neither compiles nor compares.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from data.files import write_whole
from model.config import ModelConfig
from parallel.collectives import gather_numbers
from train.measure.compiling import Compiling
from train.measure.doctor import PACKAGES, check_fp8, check_kernels, driver_version, package_version
from train.settings.paths import ROOT
from train.settings.run import Config

FOLDER = "verdicts"


def conditions(shape: ModelConfig, device: torch.device) -> dict[str, str]:
    """What a verdict holds for. Layers that repeat run on the same kernels."""
    sources = [path for package in ("model", "parallel") for path in sorted((ROOT / package).glob("**/*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "cuda": str(torch.version.cuda),
        **{package: package_version(package) for package in PACKAGES},
        "sources": digest.hexdigest(),
        "model": repr(replace(shape, repeats=1)),
    }


class Kernels:
    """The GPU kernels of a run: being compiled from when this is made, compared once `require_right` returns.

    A context manager, which ends the processes that compile. Where there is no GPU, or float32 is computed in plain
    torch, it does nothing.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.shape, self.device = config.model, device
        self.needed = device.type == "cuda" and config.model.dtype == "bfloat16"
        self._compiling: Compiling | None = None
        if not self.needed:
            return
        self._conditions = json.dumps(conditions(self.shape, device), indent=1)
        name = hashlib.sha256(self._conditions.encode()).hexdigest()[:32]
        self._file = Path(config.run.kernel_cache) / FOLDER / f"{name}.json"
        # One process of a machine compiles and compares for the others, which have the same kind of GPU.
        if os.environ.get("LOCAL_RANK", "0") == "0" and not self._file.is_file():
            self._compiling = Compiling(self.shape, device)

    def __enter__(self) -> "Kernels":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._compiling is not None:
            self._compiling.close()

    def require_right(self, show: bool) -> None:
        """Waits until they are compiled and compared on every machine, unless that was done before.

        Raises:
            RuntimeError: on every process, kernels of a machine are wrong.
        """
        if not self.needed:
            return
        wrong: list[str] = []
        if self._compiling is not None:
            wrong = self._compare(show, self._compiling)
        elif show:
            print(f"GPU kernels: compared before, {self._file}", flush=True)
        worst = max(gather_numbers(len(wrong), self.device))
        if worst:
            names = ", ".join(wrong) or f"{worst} kernels (see the first process of another machine)"
            raise RuntimeError(
                f"this machine computes {names} wrongly: another version of torch, Triton or fla may mend it "
                f"(./launch.sh doctor shows them); model.dtype=float32 needs none of these kernels"
            )

    def _compare(self, show: bool, compiling: Compiling) -> list[str]:
        if show:
            print(f"compiling {compiling.number} GPU kernels, once for this kind of machine:", flush=True)
        for line in compiling.lines():
            if show:
                print(line, flush=True)
        compiling.close()
        wrong = check_kernels(self.shape, self.device, show) + check_fp8(self.shape, self.device, show)
        if not wrong:
            self._keep()
        return wrong

    def _keep(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, self._conditions)
        except OSError as error:
            print(f"the verdict on the kernels is not kept: {self._file}: {error.strerror}", file=sys.stderr)
