"""The choice between a plain function and its kernel, and the Triton kernels in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from model import preflight
from model.config import ModelConfig
from model.kernels.backends import on_kernels
from tests.model.helpers import SMALL

ROOT = Path(__file__).parents[2]


def test_triton_kernels_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="this torch comes without Triton")
    log = tmp_path / "log.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={log}", "tests/model/interpreted_kernels.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    (suite,) = ElementTree.parse(log).getroot()
    assert int(suite.attrib["tests"]) > 0
    assert {name: suite.attrib[name] for name in ("failures", "errors", "skipped")} == dict.fromkeys(
        ("failures", "errors", "skipped"), "0"
    )


def test_the_cpu_never_runs_kernels() -> None:
    assert not on_kernels(torch.zeros(1, dtype=torch.bfloat16))
    cases = preflight.cases(SMALL, torch.device("cpu"), torch.float32)
    # Float32 against float64; what a solve inside a chunk loses is the most.
    assert {case.name for case in cases if preflight.error(case) > 1e-5} == set()


def test_a_model_is_checked_for_what_it_has() -> None:
    def names(pattern: str) -> set[str]:
        return {case.name for case in preflight.cases(ModelConfig(pattern=pattern), torch.device("cpu"))}

    assert "delta rule, whole rows" in names("G") - names("*-")
    assert "attention, packed documents" in names("*-") - names("GE")
    assert "mixture" in names("GE") - names("*-")
