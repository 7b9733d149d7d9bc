"""Every Triton kernel in Triton's interpreter on the CPU, against its twin.

Run by `test_kernels` in a process of its own, since the interpreter is chosen when Triton is imported.
"""

from dataclasses import replace

import pytest
import torch

from model import preflight
from tests.model.helpers import SMALL

# These call a library's GPU kernels; only tests/gpu and the preflight see them.
LIBRARIES = {"gated_delta_rule", "packed_attention", "router_logits", "add_product"}
SHAPES = {
    "grouped": replace(SMALL, expert_size=12),
    "plain": replace(SMALL, attention_gate=False, linear_value_heads=2, hidden_size=20, expert_size=8, conv_kernel=3),
}
# The kernels sum in float32 what the twins sum in float64: 2^-24 times a few terms, against 1e-2 for a wrong index.
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LENGTH", 12)
    monkeypatch.setattr(preflight, "VOCAB", 40)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_triton_kernels_equal_their_twins(shape) -> None:
    cases = preflight.cases(shape, torch.device("cpu"), torch.float32)
    errors = {
        case.name: preflight.error(case, case.function.kernel())
        for case in cases
        if case.function.__name__ not in LIBRARIES
    }
    assert len(errors) == 14
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}


def test_a_wrong_kernel_is_found() -> None:
    case = preflight.layer_cases(SMALL, torch.device("cpu"), torch.float32)[0]
    right = case.function.kernel()
    assert preflight.error(case, lambda x, weight, eps: right(x, weight + 0.1, eps)) > preflight.TOLERANCE
    assert preflight.error(case, lambda x, weight, eps: right(x, weight, eps) * float("nan")) == float("inf")
