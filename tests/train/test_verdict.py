"""The kernels of a GPU at the start of training: compiled in parallel, compared once, refused where they are wrong."""

import threading
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from model import preflight
from model.config import ModelConfig
from model.kernels import flash_qla
from tests.model.helpers import SMALL
from train.measure import compiling, verdict
from train.settings.run import Config, RunConfig

CUDA = torch.device("cuda")
NARROW = replace(SMALL, dtype="bfloat16")


class Compiled:
    """In place of the processes that compile: remembers for which models there were some."""

    models: ClassVar[list[ModelConfig]] = []
    number = 1

    def __init__(self, shape: ModelConfig, device: torch.device) -> None:
        self.models.append(shape)

    def lines(self) -> list[str]:
        return ["a kernel"]

    def close(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    """What the check asks a GPU for, on a machine without one; the configuration of a run there."""
    monkeypatch.setattr(Compiled, "models", [])
    monkeypatch.setattr(verdict, "Compiling", Compiled)
    monkeypatch.setattr(verdict, "check_fp8", lambda *_: [])
    monkeypatch.setattr(verdict, "check_kernels", lambda *_: [])
    monkeypatch.setattr(verdict, "driver_version", lambda: "1")
    monkeypatch.setattr(verdict, "gather_numbers", lambda own, device: [own])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return Config(model=NARROW, run=RunConfig(kernel_cache=str(tmp_path / "kernels")))


def start(config: Config, device: torch.device = CUDA) -> None:
    with verdict.Kernels(config, device) as kernels:
        kernels.require_right(True)


def test_wrong_kernels_end_the_start_and_leave_no_verdict(gpu: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "check_kernels", lambda *_: ["delta rule, packed documents"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="delta rule, packed documents wrongly"):
            start(gpu)
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process of the machine compares nothing, and ends with it
    monkeypatch.setattr(verdict, "gather_numbers", lambda own, device: [1, own])
    with pytest.raises(RuntimeError, match="1 kernels"):
        start(gpu)
    assert len(Compiled.models) == 2
    start(replace(gpu, model=SMALL))  # float32 is computed in plain torch
    start(gpu, torch.device("cpu"))
    assert len(Compiled.models) == 2 and preflight.TOLERANCE < 0.1


def test_a_second_start_neither_compiles_nor_compares(gpu: Config, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    start(gpu)
    assert "a kernel" in capsys.readouterr().out
    monkeypatch.setattr(verdict, "check_kernels", lambda *_: pytest.fail("compared again"))
    start(replace(gpu, model=replace(NARROW, repeats=3)))  # on the same kernels
    assert len(Compiled.models) == 1 and "compared before" in capsys.readouterr().out


def test_of_runs_that_start_at_once_one_compiles_and_the_others_wait_for_it(gpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(verdict, "LOOK_S", 0.01)
    first, ended = verdict.Kernels(gpu, CUDA), []
    second = verdict.Kernels(gpu, CUDA)
    assert len(Compiled.models) == 1
    waits = threading.Thread(target=lambda: ended.append(second.require_right(True)))
    waits.start()
    waits.join(0.2)
    assert not ended, "it did not wait"
    first.require_right(False)
    waits.join(10)
    assert ended and len(Compiled.models) == 1
    out = capsys.readouterr().out
    assert "another process compiles them" in out and "compared before" in out


def test_who_waits_compiles_where_the_first_ends_without_a_verdict(gpu: Config) -> None:
    first, second = verdict.Kernels(gpu, CUDA), verdict.Kernels(gpu, CUDA)
    first.__exit__(None, None, None)
    second.require_right(False)
    assert len(Compiled.models) == 2


def test_what_doctor_has_compared_a_run_does_not_compare_again(gpu: Config, monkeypatch, capsys) -> None:
    for _ in range(2):  # it compares whenever it is asked
        with verdict.Kernels(gpu, CUDA, again=True) as kernels:
            assert kernels.compared(show=False) == []
    assert len(Compiled.models) == 2
    start(gpu)
    assert len(Compiled.models) == 2 and "compared before" in capsys.readouterr().out


def test_linear_layers_have_a_verdict_of_their_own(gpu: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(verdict, "check_fp8", lambda shape, *_: checked.append(shape.fp8) or [])
    start(gpu)
    for _ in range(2):
        start(replace(gpu, model=replace(NARROW, backend="te", fp8="block")))
    start(replace(gpu, model=replace(NARROW, backend="te")))
    assert checked == ["off", "block", "off"] and len(Compiled.models) == 1
    known = verdict.package_version
    other = {"transformer-engine": "another"}
    monkeypatch.setattr(verdict, "package_version", lambda package: other.get(package) or known(package))
    start(gpu)  # no kernel comes from Transformer Engine
    assert len(checked) == 3
    start(replace(gpu, model=replace(NARROW, backend="te")))
    assert len(checked) == 4 and len(Compiled.models) == 1


@pytest.mark.parametrize("changed", ["model", "driver", "gpu", "sources"])
def test_a_verdict_holds_for_what_it_was_made_of(changed: str, gpu: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    start(gpu)
    if changed == "model":
        gpu = replace(gpu, model=replace(NARROW, head_dim=32))
    elif changed == "driver":
        monkeypatch.setattr(verdict, "driver_version", lambda: "2")
    elif changed == "gpu":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
    else:
        monkeypatch.setattr(verdict, "ROOT", Path(__file__).parent)  # where there are none
    start(gpu)
    assert len(Compiled.models) == 2


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in place of processes, and three cases in place of a model's thirty."""
    own = preflight.layer_cases(SMALL, torch.device("cpu"), torch.float32, preflight.Sizes(length=12))[:1]
    mixing = preflight.mixing_cases(SMALL, torch.device("cpu"), torch.float32, preflight.Sizes(length=12))
    own += [case for case in mixing if case.name.startswith(compiling.RULE)]
    context = SimpleNamespace(Pool=lambda number, enter: ThreadPool(number))
    monkeypatch.setattr(compiling.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(compiling, "cases", lambda shape, device: own)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    compiling._calls.cache_clear()


def compiled() -> list[str]:
    """What compiling the small model's kernels says."""
    processes = compiling.Compiling(SMALL, torch.device("cpu"))
    try:
        return list(processes.lines())
    finally:
        processes.close()


def test_every_kernel_is_called_and_told_once(threads) -> None:
    lines = compiled()
    assert [line.split(",")[0] for line in lines] == ["  1 of 3", "  2 of 3", "  3 of 3"]
    assert all("failed" not in line for line in lines)
    assert sum("delta rule, whole rows" in line for line in lines) == 1


def test_flash_qla_is_compiled_kernel_by_kernel_and_a_failure_is_told(threads, monkeypatch) -> None:
    def kernels(*arguments) -> dict:
        assert len(arguments) == 6
        return {part: (lambda part=part: 1 / (part != "states")) for part in flash_qla.PARTS}

    monkeypatch.setattr(flash_qla, "applies", lambda key, value: True)
    monkeypatch.setattr(flash_qla, "kernels", kernels)
    names = compiling.names(SMALL)
    assert names[:2] == ["delta rule, packed documents, backward", "delta rule, whole rows, backward"]
    assert {*names} == {*compiling.calls(SMALL, torch.device("cpu"))} and len(names) == 2 * len(flash_qla.PARTS) + 1
    lines = compiled()
    assert len(lines) == len(names)
    assert sum("states (failed: division by zero)" in line for line in lines) == 2
