"""The output head and the cross-entropy in one pass over chunks of tokens, so that full logits never exist.

The gradient of a weighted sum of cross-entropies is known in the forward pass: (softmax - onehot) * weight. So each
chunk's logits turn at once into gradients of its hidden states and of the head, and are dropped. The vocabulary may
be cut over the tensor-parallel group.

Shape suffixes: T tokens, H hidden, V this rank's rows of the vocabulary, C a chunk of tokens.
"""

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
    product = at_least_float32(left @ right)
    return product if total is None else total.add_(product)


@accelerated("model.kernels.loss")
def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a scalar, rounded to x's type; x may be overwritten."""
    return (x * factor).to(x.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, head_VH, target_T, weight_T, group, total_VH, train: bool):
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        losses = torch.empty(target_T.shape, dtype=dtype, device=hidden_TH.device)
        grad_hidden = torch.empty_like(hidden_TH) if train else None
        # A head that learns nothing here gets no gradient: that is a third of the work.
        learns, grad_head = train and ctx.needs_input_grad[1], None
        chunk = KERNEL_HEAD_CHUNK if on_kernels(hidden_TH) else HEAD_CHUNK
        for start in range(0, target_T.numel(), chunk):
            part = slice(start, start + chunk)
            weight = weight_T[part] if train else None
            losses[part], grad = softmax_gradient(hidden_TH[part] @ head_VH.t(), target_T[part], weight, group)
            if grad_hidden is not None:
                torch.mm(grad, head_VH, out=grad_hidden[part])
            if learns:
                # A single product is rounded once, several are summed in float32.
                once = target_T.numel() <= chunk
                left, right = grad.t(), hidden_TH[part]
                grad_head = left @ right if once else add_product(left, right, grad_head)
        if train:
            if grad_head is not None and total_VH is None:
                grad_head = grad_head.to(head_VH.dtype)
            ctx.save_for_backward(grad_hidden, grad_head, head_VH)
            ctx.total_VH = total_VH
        ctx.mark_non_differentiable(losses)
        return (losses * weight_T).sum(), losses

    @staticmethod
    def backward(ctx, grad_total: Tensor, _):
        grad_hidden, grad_head, head_VH = ctx.saved_tensors
        if grad_head is not None and ctx.total_VH is not None:
            ctx.total_VH.addcmul_(grad_head, grad_total)
            grad_head = dummy_gradient(head_VH)
        elif grad_head is not None:
            grad_head = scaled(grad_head, grad_total)
        return scaled(grad_hidden, grad_total), grad_head, None, None, None, None, None


def linear_cross_entropy(
    hidden_TH: Tensor, head_VH: Tensor, target_T: Tensor, weight_T: Tensor, group, total_VH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token cross-entropies, and the cross-entropy of each token (nats, not differentiable).

    Args:
        hidden_TH: states that the head reads. Every tensor-parallel rank has all of them, and gets the gradient of its
            own part of the vocabulary: the gather that brought them sums these.
        head_VH: this rank's rows of the output head.
        target_T: token ids; where the weight is 0 any valid id will do.
        weight_T: weight of each token in the sum, float32.
        group: tensor-parallel group over which the vocabulary is cut.
        total_VH: if given, the head's gradient is added to it (`parallel.main_grads`).
    """
    # Inside the function gradients are always off, and needs_input_grad says nothing of torch.no_grad().
    train = torch.is_grad_enabled() and (hidden_TH.requires_grad or head_VH.requires_grad)
    return _LinearCrossEntropy.apply(hidden_TH, head_VH, target_T, weight_T, group, total_VH, train)
