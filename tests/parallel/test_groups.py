"""What CUDA and torch's allocator are told before they start."""

import os

import pytest

from parallel import groups
from parallel.topology import ParallelConfig

NAMES = (*groups.ALLOCATOR, groups.CONNECTIONS, *groups.FIXED)
SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("architecture", "tensor", "given", "expected"),
    [
        (9, 1, {}, SEGMENTS),
        (9, 2, {}, SEGMENTS | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        (10, 2, {}, SEGMENTS),  # Blackwell keeps the order of launches by itself
        (0, 2, {}, {}),  # a machine without a GPU
        (9, 2, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, SEGMENTS | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
        (9, 1, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_variables_are_set_where_they_are_right_and_said(
    monkeypatch, architecture: int, tensor: int, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(groups, "_architecture", lambda: architecture)
    groups.set_cuda_variables(ParallelConfig(tensor=tensor))
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == expected
    assert groups.cuda_variables() == "on GPUs: " + ", ".join(f"{name}={value}" for name, value in expected.items())


def test_a_deterministic_run_fixes_what_would_be_chosen_anew(monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    monkeypatch.setattr(groups, "_architecture", lambda: 9)
    groups.set_cuda_variables(ParallelConfig(), deterministic=True)
    assert os.environ == SEGMENTS | {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "TRITON_CACHE_AUTOTUNING": "1"}
    assert groups.cuda_variables().endswith("CUBLAS_WORKSPACE_CONFIG=:16:8, TRITON_CACHE_AUTOTUNING=1")


def test_a_machine_without_nvml_has_no_architecture(monkeypatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", absent)
    assert groups._architecture() == 0
