"""Numeric preflight: every GPU kernel against its plain twin in float64, forwards and backwards, on this machine.

Libraries and compilers have shipped kernels with wrong gradients for some head sizes on some cards (fla with Triton
3.4 to 3.7.0 on Hopper is one), and a model trains on those without a sign. So the sizes are those of the model that
is to be trained; only tokens and experts are few. Errors are one ratio of norms for each tensor: at these few rows a
single wrong one shows, among a hundred thousand it would not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from model.config import ModelConfig
from model.documents import Documents
from model.layers.attention import gate_heads, packed_attention, prepare_heads
from model.layers.chain import prefix_attention, prefix_gradients
from model.layers.delta_rule import gated_delta_rule
from model.layers.deltanet import prepare_delta
from model.layers.dense import swiglu_pairs
from model.layers.experts import fused_moe, gate_rows
from model.layers.loss import add_product, scaled, softmax_gradient
from model.layers.norm import gated_rms_norm, rms_norm_with_residual, zero_centred_rms_norm
from model.layers.rope import rotary_table
from model.layers.router import route, router_logits
from model.layers.rows import count_sorted, invert, permute, unpermute
from model.reference.prefix import dense_prefix, dense_prefix_gradients
from parallel.main_grads import add_weight_gradient

# A result is rounded to 8 bits once or twice (2^-9 each), and so are the operands inside a chain of products; a wrong
# mask, index or gradient shows as 0.1 or more.
TOLERANCE = 1e-2
BROKEN_K = 4  # experts of a token whose logits are no numbers
NO_GROUP = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


@dataclass(frozen=True)
class Sizes:
    """How much the kernels are given; widths and heads are the model's own."""

    rows: int = 2
    length: int = 192
    experts: int = 6
    routed: int = 4  # experts of a token
    vocab: int = 1000

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class Case:
    """One kernel on one input.

    Attributes:
        function: the function with the kernel; ``__wrapped__`` is its twin. leaves: tensors to differentiate by.
        call: calls either one on leaves. twin: another one, where the plain function has no float64 on a GPU.
    """

    name: str
    function: Callable
    leaves: list[Tensor]
    call: Callable[[Callable, list[Tensor]], Tensor | tuple]
    twin: Callable | None = None


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


def _documents(device: torch.device, single: bool, sizes: Sizes) -> Documents:
    ids_RL = torch.zeros(sizes.rows, sizes.length, dtype=torch.int64)
    if not single:
        ids_RL[0, sizes.length // 3 :] = 1
        ids_RL[0, sizes.length // 3 + 2 :] = 2
        ids_RL[1, 2 * sizes.length // 3 :] = -1
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

    def __call__(self, x: Tensor | None = None) -> Tensor:
        return self.weight if x is None else self.apply(x)


def layer_cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Case]:
    """Norms, attention and Gated DeltaNet but for the delta rule and attention themselves."""
    draw, tokens, eps = _Draw(device, dtype), sizes.tokens, shape.norm_eps
    dim, groups, each = shape.head_dim, shape.key_value_heads, shape.attention_heads // shape.key_value_heads
    gates = each if shape.attention_gate else 0
    key, value = shape.linear_key_dim, shape.linear_value_dim
    heads, ratio = shape.linear_key_heads, shape.linear_value_heads // shape.linear_key_heads
    documents = _documents(device, False, sizes)
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
            draw.narrow(sizes.rows, sizes.length, heads, per_head),
            draw.narrow(heads * (2 * key + ratio * value), shape.conv_kernel, scale=0.5),
            draw.wide(heads * ratio),
            draw.wide(heads * ratio),
        ]
        rest = _plain(documents, ratio, key, value)
        cases.append(Case("Gated DeltaNet's heads", prepare_delta, leaves, rest))
        leaves = [*(draw.narrow(tokens, heads * ratio, value) for _ in range(2)), draw.wide(value)]
        cases.append(Case("gated norm", gated_rms_norm, leaves, _plain(eps)))
    return cases


def _call_prefix(documents: Documents, function: Callable, leaves: list[Tensor]) -> tuple:
    return function(*(leaf.detach() for leaf in leaves), documents)


def _call_prefix_gradients(documents: Documents, function: Callable, leaves: list[Tensor]) -> tuple:
    """Gradients through the prefix's part of a softmax over twice as many keys, whose others add as much again."""
    grad, q, k, v = (leaf.detach() for leaf in leaves)
    out, lse = (
        x.to(q.dtype) if x.ndim == 3 else x for x in dense_prefix(q.double(), k.double(), v.double(), documents)
    )
    lse = lse.to(torch.promote_types(q.dtype, torch.float32)) + math.log(2)
    return tuple(function(grad, q, k, v, out.to(q.dtype), lse, documents))


def mixing_cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Case]:
    """The delta rule and softmax attention, over packed documents and over whole rows."""
    draw, cases = _Draw(device, dtype), []
    for name, single in (("packed documents", False), ("whole rows", True)):
        documents = _documents(device, single, sizes)
        if "*" in shape.layers:
            heads, tokens = (shape.attention_heads, shape.key_value_heads, shape.key_value_heads), sizes.tokens
            leaves = [draw.narrow(tokens, number, shape.head_dim) for number in heads]
            cases.append(Case(f"attention, {name}", packed_attention, leaves, _plain(documents)))
            call = partial(_call_prefix, documents)
            cases.append(Case(f"attention's softmax, {name}", prefix_attention, leaves, call, dense_prefix))
            leaves, call = [draw.narrow(*leaves[0].shape), *leaves], partial(_call_prefix_gradients, documents)
            cases.append(Case(f"part of a softmax, {name}", prefix_gradients, leaves, call, dense_prefix_gradients))
        if "G" in shape.layers:
            where, values = (sizes.rows, sizes.length), shape.linear_value_heads
            q, k = (draw.narrow(*where, shape.linear_key_heads, shape.linear_key_dim) for _ in range(2))
            q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
            g, beta = -draw.wide(*where, values).exp() * 0.1, draw.wide(*where, values).sigmoid()
            leaves = [q, k, draw.narrow(*where, values, shape.linear_value_dim), g, beta]
            cases.append(Case(f"delta rule, {name}", gated_delta_rule, leaves, _plain(documents)))
    return cases


def _call_main_grads(rest: tuple, function: Callable, leaves: list[Tensor]) -> tuple:
    """What the weights' gradients are added to; the gradient of the result is the result itself, doubled."""
    types = [torch.promote_types(weight.dtype, torch.float32) for weight in leaves[1:3]]
    main_grads = tuple(torch.ones_like(weight, dtype=dtype) for weight, dtype in zip(leaves[1:3], types, strict=True))
    function(*leaves, *rest, main_grads).square().sum().backward()
    return main_grads


def _call_broken(function: Callable, leaves: list[Tensor]) -> tuple:
    """Rows of logits that hold no number: experts that exist, each once, and weights that are no numbers either."""
    logits_TE = leaves[0].detach().clone()
    logits_TE[0, -1], logits_TE[1, 0], logits_TE[2] = float("nan"), float("inf"), float("-inf")
    k = min(logits_TE.shape[1], BROKEN_K)
    _, weights_TK, experts_TK = function(logits_TE, k)
    ordered = experts_TK.sort(dim=1).values
    legal = (ordered[:, 0] >= 0) & (ordered[:, -1] < logits_TE.shape[1]) & (ordered.diff(dim=1) > 0).all(dim=1)
    return legal.to(logits_TE.dtype), weights_TK[:3].isnan().to(logits_TE.dtype), weights_TK[3:]


def _call_weight_gradient(function: Callable, leaves: list[Tensor]) -> Tensor:
    x, grad, total = (leaf.detach() for leaf in leaves)
    total = total.clone()
    function(x, grad, total)
    return total


def _weight_gradient(x_NI: Tensor, grad_NO: Tensor, total_OI: Tensor) -> None:
    """The twin of `add_weight_gradient`."""
    total_OI += grad_NO.T @ x_NI


def _narrow_experts(shape: ModelConfig, draw: "_Draw", sizes: Sizes) -> Case:
    """The grouped products of as many experts as the model has, with few columns; each row is a token of its own."""
    experts, rows = shape.experts, sizes.tokens * shape.experts_per_token
    counts_E = torch.randint(experts, (rows,), generator=draw.generator).bincount(minlength=experts)
    weights = (draw.narrow(experts, 2, 16, 32, scale=0.1), draw.narrow(experts, 32, 16, scale=0.1))
    leaves = [draw.narrow(rows, 32), *weights, draw.wide(rows).sigmoid()]
    source_N = torch.arange(rows, device=draw.device)
    return Case("all experts, narrow", fused_moe, leaves, _plain(counts_E.to(draw.device), source_N, source_N[:, None]))


def expert_cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Case]:
    """What a mixture of experts is made of; one expert goes without a row, and tokens have unequal numbers of them."""
    draw, tokens, hidden, width = _Draw(device, dtype), sizes.tokens, shape.hidden_size, shape.expert_size
    chosen_TK = torch.rand(tokens, sizes.experts - 1, generator=draw.generator).topk(sizes.routed).indices
    elsewhere_TK = torch.rand(tokens, sizes.routed, generator=draw.generator) < 0.3
    ordered, order = chosen_TK.masked_fill(elsewhere_TK, sizes.experts).flatten().sort(stable=True)
    counts_E = count_sorted(ordered, sizes.experts)
    order_N = order[: int(counts_E.sum())]
    rows, inverse_TK = len(order_N), invert(order_N, len(order)).view(tokens, sizes.routed)
    moved = (order_N.to(device) // sizes.routed, inverse_TK.to(device))
    weights = (
        draw.narrow(sizes.experts, 2, width, hidden, scale=0.02),
        draw.narrow(sizes.experts, hidden, width, scale=0.02),
    )
    mixture = [draw.narrow(tokens, hidden), *weights, draw.wide(rows).sigmoid()]
    rest = (counts_E.to(device), *moved)
    return [
        Case("router", router_logits, [draw.narrow(tokens, hidden), draw.wide(shape.experts, hidden, scale=0.02)],
             _plain()),
        Case("top-k", route, [draw.wide(tokens, shape.experts)], _plain(shape.experts_per_token)),
        Case("top-k of what is no number", route, [draw.wide(tokens, shape.experts)], _call_broken),
        _narrow_experts(shape, draw, sizes),
        Case("shared expert's gate", gate_rows, [draw.narrow(tokens, hidden), draw.narrow(tokens, 1)], _plain()),
        Case("rows to experts", permute, [draw.narrow(tokens, hidden)], _plain(*moved)),
        Case("rows from experts", unpermute, [draw.narrow(rows, hidden)], _plain(*moved)),
        Case("gradients into sums", fused_moe, mixture, partial(_call_main_grads, rest)),
        Case("mixture", fused_moe, mixture, _plain(*rest)),
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


def head_cases(shape: ModelConfig, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Case]:
    """The softmax of the head and the sum of the head's gradient, which are their own gradients."""
    draw, tokens = _Draw(device, dtype), sizes.tokens
    target_T = torch.randint(sizes.vocab, (tokens,), generator=draw.generator).to(device)
    leaves = [draw.narrow(tokens, sizes.vocab, scale=3.0), draw.wide(tokens).sigmoid()]
    products = [
        draw.narrow(sizes.vocab, tokens),
        draw.narrow(tokens, shape.hidden_size),
        draw.wide(sizes.vocab, shape.hidden_size),
    ]
    return [
        Case("cross-entropy", softmax_gradient, leaves, partial(_call_loss, target_T)),
        Case("sum of products", add_product, products, _call_sum),
        Case(
            "gradient of a linear layer",
            add_weight_gradient,
            [
                draw.narrow(tokens, shape.hidden_size),
                draw.narrow(tokens, shape.hidden_size),
                draw.wide(shape.hidden_size, shape.hidden_size),
            ],
            _call_weight_gradient,
            _weight_gradient,
        ),
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
    twin = case.twin or case.function.__wrapped__
    slow = _results(case, twin, [x.detach().double().requires_grad_() for x in case.leaves])
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(fast, slow, strict=True)]
    return max(value if value == value else float("inf") for value in errors)


def cases(
    shape: ModelConfig,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    sizes: Sizes = Sizes(),
) -> list[Case]:
    """Every kernel that a model of this shape runs on."""
    parts = [layer_cases, mixing_cases, head_cases] + [expert_cases] * ("E" in shape.layers)
    return [case for part in parts for case in part(shape, device, dtype, sizes)]
