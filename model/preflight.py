"""Numeric preflight: every GPU kernel against its plain twin in float64, forwards and backwards, on this machine.

Libraries and compilers have shipped kernels with wrong gradients for some head sizes on some cards (fla with Triton
3.4 to 3.7.0 on Hopper is one), and a model trains on those without a sign. So the sizes are those of the model that
is to be trained; only tokens and experts are few.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from model.config import ModelConfig
from model.documents import Documents
from model.layers.attention import gate_heads, packed_attention, prepare_heads, rotary_table
from model.layers.delta_rule import gated_delta_rule
from model.layers.deltanet import prepare_delta
from model.layers.dense import swiglu_pairs
from model.layers.experts import combine_rows, count_sorted, expert_rows, gate_rows, gather_rows, invert, mix_rows
from model.layers.loss import add_product, scaled, softmax_gradient
from model.layers.norm import gated_rms_norm, rms_norm_with_residual, zero_centred_rms_norm
from model.layers.router import route, router_logits

ROWS, LENGTH, EXPERTS, ROUTED, VOCAB = 2, 192, 6, 4, 1000
# A result is rounded to 8 bits once or twice (2^-9 each), and so are the operands inside a chain of products; a wrong
# mask, index or gradient shows as 0.1 or more.
TOLERANCE = 1e-2
NO_GROUP = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


@dataclass(frozen=True)
class Case:
    """One kernel on one input.

    Attributes:
        function: the function with the kernel; ``__wrapped__`` is its twin. leaves: tensors to differentiate by.
        call: calls either one on leaves.
    """

    name: str
    function: Callable
    leaves: list[Tensor]
    call: Callable[[Callable, list[Tensor]], Tensor | tuple]


def _plain(*rest) -> Callable:
    return lambda function, leaves: function(*leaves, *rest)


class _Draw:
    """Random leaves on a device; ``narrow`` in the type under test, ``wide`` in float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator, self.device, self.dtype = torch.Generator().manual_seed(0), device, dtype

    def wide(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device)

    def narrow(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.wide(*shape, scale=scale).to(self.dtype)


def _documents(device: torch.device, single: bool) -> Documents:
    ids_RL = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    if not single:
        ids_RL[0, LENGTH // 3 :] = 1
        ids_RL[0, LENGTH // 3 + 2 :] = 2
        ids_RL[1, 2 * LENGTH // 3 :] = -1
    return Documents.from_ids(ids_RL).to(device)


def _call_heads(table: Tensor, each: int, gates: int, eps: float, function: Callable, leaves: list[Tensor]) -> tuple:
    def norm(weight: Tensor) -> Callable:
        # The twin applies it; the kernel reads its parts.
        apply = partial(zero_centred_rms_norm.__wrapped__, weight=weight, eps=eps)
        return _Norm(apply, weight, eps)

    mixed, q_weight, k_weight = leaves
    return function(mixed, norm(q_weight), norm(k_weight), table.to(q_weight.dtype), each, gates)


@dataclass(frozen=True)
class _Norm:
    apply: Callable
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x)


def layer_cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Norms, attention and Gated DeltaNet but for the delta rule and attention themselves."""
    draw, tokens, eps = _Draw(device, dtype), ROWS * LENGTH, shape.norm_eps
    dim, groups, each = shape.head_dim, shape.key_value_heads, shape.attention_heads // shape.key_value_heads
    gates = each if shape.attention_gate else 0
    key, value = shape.linear_key_dim, shape.linear_value_dim
    heads, ratio = shape.linear_key_heads, shape.linear_value_heads // shape.linear_key_heads
    documents = _documents(device, single=False)
    per_head = 2 * key + ratio * (2 * value + 2)
    normed = [draw.narrow(tokens, shape.hidden_size), draw.wide(shape.hidden_size)]
    cases = [
        Case("norm", zero_centred_rms_norm, normed, _plain(eps)),
        Case("norm and residual", rms_norm_with_residual, normed, _plain(eps)),
        Case("SwiGLU", swiglu_pairs, [draw.narrow(tokens, 1, 2 * (shape.shared_expert_size or shape.dense_size))],
             _plain()),
    ]  # fmt: skip
    if "*" in shape.layers:
        table = rotary_table(documents.position_RL, shape)
        leaves = [draw.narrow(tokens, groups, each + gates + 2, dim), draw.wide(dim), draw.wide(dim)]
        cases.append(Case("attention's heads", prepare_heads, leaves, partial(_call_heads, table, each, gates, eps)))
        leaves = [draw.narrow(tokens, groups * each, dim), draw.narrow(tokens, groups * each, dim)]
        cases.append(Case("attention's gate", gate_heads, leaves, _plain()))
    if "G" in shape.layers:
        leaves = [
            draw.narrow(ROWS, LENGTH, heads, per_head),
            draw.narrow(heads * (2 * key + ratio * value), shape.conv_kernel, scale=0.5),
            draw.wide(heads * ratio),
            draw.wide(heads * ratio),
        ]
        rest = _plain(documents, ratio, key, value)
        cases.append(Case("Gated DeltaNet's heads", prepare_delta, leaves, rest))
        leaves = [*(draw.narrow(tokens, heads * ratio, value) for _ in range(2)), draw.wide(value)]
        cases.append(Case("gated norm", gated_rms_norm, leaves, _plain(eps)))
    return cases


def mixing_cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The delta rule and softmax attention, over packed documents and over whole rows."""
    draw, cases = _Draw(device, dtype), []
    for name, single in (("packed documents", False), ("whole rows", True)):
        documents = _documents(device, single)
        if "*" in shape.layers:
            heads, tokens = (shape.attention_heads, shape.key_value_heads, shape.key_value_heads), ROWS * LENGTH
            leaves = [draw.narrow(tokens, number, shape.head_dim) for number in heads]
            cases.append(Case(f"attention, {name}", packed_attention, leaves, _plain(documents)))
        if "G" in shape.layers:
            where, values = (ROWS, LENGTH), shape.linear_value_heads
            q, k = (draw.narrow(*where, shape.linear_key_heads, shape.linear_key_dim) for _ in range(2))
            q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
            g, beta = -draw.wide(*where, values).exp() * 0.1, draw.wide(*where, values).sigmoid()
            leaves = [q, k, draw.narrow(*where, values, shape.linear_value_dim), g, beta]
            cases.append(Case(f"delta rule, {name}", gated_delta_rule, leaves, _plain(documents)))
    return cases


def _call_totals(counts_E: Tensor, function: Callable, leaves: list[Tensor]) -> tuple:
    """What the weights' gradients are added to; the gradient of the rows is the rows themselves."""
    types = [torch.promote_types(weight.dtype, torch.float32) for weight in leaves[1:3]]
    totals = tuple(torch.ones_like(weight, dtype=dtype) for weight, dtype in zip(leaves[1:3], types, strict=True))
    function(*leaves, counts_E, totals).square().sum().backward()
    return totals


def expert_cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """What a mixture of experts is made of; one expert goes without a row."""
    draw, tokens, hidden, width = _Draw(device, dtype), ROWS * LENGTH, shape.hidden_size, shape.expert_size
    chosen_TK = torch.rand(tokens, EXPERTS - 1, generator=draw.generator).topk(ROUTED).indices
    ordered_N, order_N = chosen_TK.flatten().sort(stable=True)
    inverse_TK, counts_E = invert(order_N).view(tokens, ROUTED).to(device), count_sorted(ordered_N, EXPERTS).to(device)
    order_N = order_N.to(device)
    rows = tokens * ROUTED
    weights = (draw.narrow(EXPERTS, 2, width, hidden, scale=0.02), draw.narrow(EXPERTS, hidden, width, scale=0.02))
    return [
        Case("router", router_logits, [draw.narrow(tokens, hidden), draw.wide(shape.experts, hidden, scale=0.02)],
             _plain()),
        Case("top-k", route, [draw.wide(tokens, shape.experts)], _plain(shape.experts_per_token)),
        Case("shared expert's gate", gate_rows, [draw.narrow(tokens, hidden), draw.narrow(tokens, 1)], _plain()),
        Case("rows to experts", gather_rows, [draw.narrow(tokens, hidden)], _plain(order_N, inverse_TK)),
        Case("rows from experts", combine_rows, [draw.narrow(rows, hidden)], _plain(order_N, inverse_TK)),
        Case("grouped products", expert_rows, [draw.narrow(rows, hidden), *weights, draw.wide(rows).sigmoid()],
             _plain(counts_E)),
        Case("gradients into sums", expert_rows, [draw.narrow(rows, hidden), *weights, draw.wide(rows).sigmoid()],
             partial(_call_totals, counts_E)),
        Case("mixture", mix_rows, [draw.narrow(tokens, hidden), *weights, draw.wide(rows).sigmoid()],
             _plain(counts_E, order_N, inverse_TK)),
    ]  # fmt: skip


def _call_loss(target_T: Tensor, function: Callable, leaves: list[Tensor]) -> tuple:
    logits_CV, weight_C = (leaf.detach() for leaf in leaves)
    return function(logits_CV.clone(), target_T, weight_C, NO_GROUP)


def _call_sum(function: Callable, leaves: list[Tensor]) -> Tensor:
    left, right, total = (leaf.detach() for leaf in leaves)
    return function(left, right, function(left, right, total.clone()))


def _call_scaled(function: Callable, leaves: list[Tensor]) -> Tensor:
    x, factor = (leaf.detach() for leaf in leaves)
    return function(x.clone(), factor)


def head_cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The softmax of the head and the sum of the head's gradient, which are their own gradients."""
    draw, tokens = _Draw(device, dtype), ROWS * LENGTH
    target_T = torch.randint(VOCAB, (tokens,), generator=draw.generator).to(device)
    leaves = [draw.narrow(tokens, VOCAB, scale=3.0), draw.wide(tokens).sigmoid()]
    products = [draw.narrow(VOCAB, tokens), draw.narrow(tokens, shape.hidden_size), draw.wide(VOCAB, shape.hidden_size)]
    return [
        Case("cross-entropy", softmax_gradient, leaves, partial(_call_loss, target_T)),
        Case("sum of products", add_product, products, _call_sum),
        Case("scaled gradient", scaled, [draw.narrow(tokens, shape.hidden_size), draw.wide(1).exp()], _call_scaled),
    ]


def _results(case: Case, function: Callable, leaves: list[Tensor]) -> list[Tensor]:
    """Outputs of a function, and the gradients of a random weighting of them by each leaf where there are any."""
    out = case.call(function, leaves)
    outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point() and x.numel()]
    graph = [x for x in outputs if x.requires_grad]
    if not graph:
        return outputs
    generator = torch.Generator().manual_seed(1)
    weightings = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in graph]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(graph, leaves, weightings)]


def error(case: Case, function: Callable | None = None) -> float:
    """Largest relative error |fast - slow| / |slow| of any output or gradient; infinite where one is no number.

    Args:
        function: the fast one; None: the case's own, as it is chosen for its tensors.
    """
    fast = _results(case, function or case.function, [x.detach().clone().requires_grad_() for x in case.leaves])
    slow = _results(case, case.function.__wrapped__, [x.detach().double().requires_grad_() for x in case.leaves])
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(fast, slow, strict=True)]
    return max(value if value == value else float("inf") for value in errors)


def cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """Every kernel that a model of this shape runs on."""
    parts = [layer_cases, mixing_cases, head_cases] + [expert_cases] * ("E" in shape.layers)
    return [case for part in parts for case in part(shape, device, dtype)]
