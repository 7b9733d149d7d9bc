"""The output head and the cross-entropy in one pass over chunks of tokens, so that full logits never exist.

The gradient of a weighted sum of cross-entropies is known in the forward pass: (softmax - onehot) * weight. So each
chunk's logits turn at once into gradients of its hidden states and of the head, and are dropped. The head's gradient
is one float32 sum over all chunks and prediction steps. The vocabulary may
be cut over the tensor-parallel group.

Shape suffixes: T tokens, H hidden, V this rank's rows of the vocabulary, C a chunk of tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import HEAD_CHUNK, KERNEL_HEAD_CHUNK
from model.kernels.backends import accelerated, on_kernels
from model.layers.norm import at_least_float32
from parallel.collectives import max_over, sum_over
from parallel.main_grads import dummy_gradient


def _chunk_losses(logits_CV: Tensor, target_C: Tensor, group) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of a chunk [C], its softmax [C, V] (in place of the logits), and the local one-hot column."""
    first = group.rank() * logits_CV.shape[1]
    largest = max_over(logits_CV.max(dim=-1).values, group)
    logits_CV.sub_(largest[:, None])
    local = target_C - first
    here = (local >= 0) & (local < logits_CV.shape[1])
    column = local.clamp(0, logits_CV.shape[1] - 1)[:, None]
    target_logit = torch.where(here, logits_CV.gather(1, column)[:, 0], 0)
    logits_CV.exp_()
    sums = sum_over(torch.stack([logits_CV.sum(dim=-1), target_logit]), group)
    logits_CV.div_(sums[0][:, None])
    return sums[0].log() - sums[1], logits_CV, torch.where(here, column[:, 0], -1)


@accelerated("model.kernels.loss")
def softmax_gradient(
    logits_CV: Tensor, target_C: Tensor, weight_C: Tensor | None, group
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of a chunk [C], and the gradient [C, V] of its weighted sum, of the logits' type.

    Args:
        logits_CV: this rank's part of the vocabulary; may be overwritten. weight_C: None: no gradient is wanted.
    """
    dtype = logits_CV.dtype
    losses, probability, column = _chunk_losses(at_least_float32(logits_CV), target_C, group)
    if weight_C is None:
        return losses, None
    rows = (column >= 0).nonzero()[:, 0]
    probability[rows, column[rows]] -= 1
    return losses, (probability * weight_C[:, None]).to(dtype)


@accelerated("model.kernels.loss")
def add_product(left: Tensor, right: Tensor, total: Tensor | None) -> Tensor:
    """total + left @ right in at least float32, in place of the total; None counts as zero."""
    product = at_least_float32(left) @ at_least_float32(right)
    return product if total is None else total.add_(product)


@accelerated("model.kernels.loss")
def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a scalar, rounded to x's type; x may be overwritten."""
    return (x * factor).to(x.dtype)


class _LinearCrossEntropies(torch.autograd.Function):
    """All prediction steps at once: one sum of the head's gradient, and one gradient that autograd sees."""

    @staticmethod
    def forward(ctx, head_VH: Tensor, main_grad_VH: Tensor | None, group, chunk: int, steps, *hidden_TH: Tensor):
        wide = torch.promote_types(head_VH.dtype, torch.float32)
        grad_head, grads_hidden, sums, losses = None, [], [], []
        for (target_T, weight_T, learns), hidden, needed in zip(
            steps, hidden_TH, ctx.needs_input_grad[5:], strict=True
        ):
            trains = learns is not None
            learns = bool(learns) and ctx.needs_input_grad[0]
            own = torch.empty(target_T.shape, dtype=wide, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if trains and needed else None
            for start in range(0, target_T.numel(), chunk):
                part = slice(start, start + chunk)
                weight = weight_T[part] if grad_hidden is not None or learns else None
                own[part], grad = softmax_gradient(hidden[part] @ head_VH.t(), target_T[part], weight, group)
                if grad_hidden is not None:
                    torch.mm(grad, head_VH, out=grad_hidden[part])
                if learns:  # else a third of the work is left out
                    grad_head = add_product(grad.t(), hidden[part], grad_head)
            losses.append(own)
            sums.append((own * weight_T).sum())
            grads_hidden.append(grad_hidden)
        if grad_head is not None and main_grad_VH is None:
            grad_head = grad_head.to(head_VH.dtype)
        ctx.save_for_backward(grad_head, *grads_hidden)
        ctx.head_VH, ctx.main_grad_VH = head_VH, main_grad_VH  # itself, see `dummy_gradient`
        tokens = torch.stack(losses)
        ctx.mark_non_differentiable(tokens)
        return torch.stack(sums).sum(), tokens

    @staticmethod
    def backward(ctx, grad_total: Tensor, _):
        grad_head, *grads_hidden = ctx.saved_tensors
        if grad_head is not None and ctx.main_grad_VH is not None:
            ctx.main_grad_VH.addcmul_(grad_head, grad_total)
            grad_head = dummy_gradient(ctx.head_VH)
        elif grad_head is not None:
            grad_head = scaled(grad_head, grad_total)
        grads = [None if grad is None else scaled(grad, grad_total) for grad in grads_hidden]
        return grad_head, None, None, None, None, *grads


@dataclass(frozen=True)
class Targets:
    """What one prediction step is asked.

    Attributes:
        token_T: token ids; where the weight is 0 any valid id will do. weight_T: weight of each token in the sum, in
            at least float32. head_learns: whether the head gets this step's gradient.
    """

    token_T: Tensor
    weight_T: Tensor
    head_learns: bool = True


def linear_cross_entropy(
    hidden_TH: list[Tensor],
    head_VH: Tensor,
    targets: list[Targets],
    group,
    main_grad_VH: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of all prediction steps, and the cross-entropy of each token (nats, not
    differentiable): a scalar and [steps, T].

    Args:
        hidden_TH: states that the head reads at each step. Every tensor-parallel rank has all of them, and gets the
            gradient of its own part of the vocabulary: the gather that brought them sums these.
        head_VH: this rank's rows of the output head.
        targets: what each step is asked.
        group: tensor-parallel group over which the vocabulary is cut.
        main_grad_VH: float32; if given, the head's gradient is added to it (`parallel.main_grads`).
        chunk: tokens whose logits exist at once; None: as many as suits the device.
    """
    if chunk is None:
        chunk = KERNEL_HEAD_CHUNK if on_kernels(head_VH) else HEAD_CHUNK
    # Inside the function gradients are always off, and needs_input_grad says nothing of torch.no_grad().
    train = torch.is_grad_enabled()
    steps = [(each.token_T, each.weight_T, each.head_learns if train else None) for each in targets]
    return _LinearCrossEntropies.apply(head_VH, main_grad_VH, group, chunk, steps, *hidden_TH)
