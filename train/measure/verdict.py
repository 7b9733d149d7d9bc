"""The check of GPU kernels at the start of training: made once for a kind of machine, and its verdict kept.

A verdict holds for the same GPU, driver, versions, sources and sizes, and lies beside the compiled kernels
(`run.kernel_cache`), so that a second start neither compiles nor compares. Of runs and machines that share it and start
at once, one compiles and the others wait for its verdict.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from data.files import write_whole
from model.config import ModelConfig
from parallel.collectives import gather_numbers
from train.measure.checks import check_fp8, check_kernels, driver_version, package_version
from train.measure.compiling import Compiling
from train.settings.paths import ROOT
from train.settings.run import Config

FOLDER = "verdicts"
KERNELS_ONLY: dict[str, Any] = {"backend": "torch", "fp8": "off"}  # linear layers have a verdict of their own
PACKAGES = ("torch", "triton", "megatron-core", "flash-linear-attention", "tilelang", "flash-qla")
LOOK_S, TELL_S = 0.5, 30.0  # between looks whether another process is done, and between lines about it


def conditions(shape: ModelConfig, device: torch.device) -> dict[str, str]:
    """What a verdict holds for. Layers that repeat run on the same kernels."""
    sources = [path for package in ("model", "parallel") for path in sorted((ROOT / package).glob("**/*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    packages = PACKAGES if shape.backend == KERNELS_ONLY["backend"] else (*PACKAGES, "transformer-engine")
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "cuda": str(torch.version.cuda),
        **{package: package_version(package) for package in packages},
        "sources": digest.hexdigest(),
        "model": repr(replace(shape, repeats=1)),
    }


class Verdict:
    """That something computes right under some conditions, beside the compiled kernels."""

    def __init__(self, kernel_cache: str, holds_for: dict[str, str]) -> None:
        self._conditions = json.dumps(holds_for, indent=1)
        name = hashlib.sha256(self._conditions.encode()).hexdigest()[:32]
        self.file = Path(kernel_cache) / FOLDER / f"{name}.json"

    def is_known(self) -> bool:
        """Whether it was kept before."""
        return self.file.is_file()

    def keep(self) -> None:
        """Keeps it, or says why not."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, self._conditions)
        except OSError as error:
            print(f"the verdict on the kernels is not kept: {self.file}: {error.strerror}", file=sys.stderr)


class Turn:
    """Who compiles, of all processes that share a directory of kernels; it ends with its process at the latest.

    Where the directory cannot be written to or locked, everyone compiles.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._handle: int | None = None

    def taken(self) -> bool:
        """Whether it is this process's, which asks for it."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644) if self._handle is None else self._handle
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def wait(self, show: bool) -> None:
        """Returns when it is this process's."""
        began = told = time.monotonic()
        while not self.taken():
            if show and (told == began or time.monotonic() - told > TELL_S):
                told = time.monotonic()
                print(f"GPU kernels: another process compiles them, {told - began:.0f} s", flush=True)
            time.sleep(LOOK_S)

    def end(self) -> None:
        """Lets another one have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Kernels:
    """The GPU kernels of a run: being compiled from when this is made, compared once `require_right` returns.

    A context manager, which ends the processes that compile. Where there is no GPU, or float32 is computed in plain
    torch, it does nothing.

    Args:
        again: compile and compare them on any GPU, whatever is known of them.
    """

    def __init__(self, config: Config, device: torch.device, again: bool = False) -> None:
        self.shape, self.device = config.model, device
        self.needed = device.type == "cuda" and (again or config.model.dtype == "bfloat16")
        self._compiling: Compiling | None = None
        self._turn: Turn | None = None
        if not self.needed:
            return
        cache = config.run.kernel_cache
        self._right = Verdict(cache, conditions(replace(self.shape, **KERNELS_ONLY), device))
        self._linears_right = Verdict(cache, conditions(self.shape, device))  # the same where they are torch's
        # One process of a machine compiles and compares for the others, which have the same kind of GPU.
        if os.environ.get("LOCAL_RANK", "0") == "0" and (again or not self._is_known()):
            self._turn = Turn(self._right.file.with_suffix(".lock"))
            if self._turn.taken() and (again or not self._right.is_known()):
                self._compiling = Compiling(self.shape, device)

    def _is_known(self) -> bool:
        return self._right.is_known() and self._linears_right.is_known()

    def __enter__(self) -> "Kernels":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._compiling is not None:
            self._compiling.close()
        if self._turn is not None:
            self._turn.end()
        self._compiling = self._turn = None

    def require_right(self, show: bool) -> None:
        """Waits until they are compiled and compared on every machine, unless that was done before.

        Raises:
            RuntimeError: on every process, kernels of a machine are wrong.
        """
        if not self.needed:
            return
        wrong: list[str] = []
        if self._turn is not None:
            self._turn.wait(show)
        if self._turn is not None and not self._is_known():
            wrong = self.compared(show)
        elif show:
            print(f"GPU kernels: compared before, {self._right.file}", flush=True)
        self._end()
        worst = max(gather_numbers(len(wrong), self.device))
        if worst:
            names = ", ".join(wrong) or f"{worst} kernels (see the first process of another machine)"
            raise RuntimeError(
                f"this machine computes {names} wrongly: another version of torch, Triton or fla may mend it "
                f"(./launch.sh doctor shows them); model.dtype=float32 needs none of these kernels"
            )

    def compared(self, show: bool) -> list[str]:
        """The names of the wrong ones, once all are compiled; what is right is kept."""
        if self._turn is not None:
            self._turn.wait(show)
        wrong: list[str] = []
        if self._compiling is not None or not self._right.is_known():
            compiling = self._compiling = self._compiling or Compiling(self.shape, self.device)
            if show:
                print(f"compiling {compiling.number} GPU kernels, once for this kind of machine:", flush=True)
            for line in compiling.lines():
                if show:
                    print(line, flush=True)
            compiling.close()
            wrong = check_kernels(self.shape, self.device, show)
            if not wrong:
                self._right.keep()
        linears = check_fp8(self.shape, self.device, show)
        if not linears and not wrong and not self._linears_right.is_known():
            self._linears_right.keep()
        return wrong + linears
