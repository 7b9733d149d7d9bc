"""The output head and the cross-entropy in one pass over chunks of tokens, so that full logits never exist.

The gradient of a weighted sum of cross-entropies is known in the forward pass: (softmax - onehot) * weight. So each
chunk's logits turn at once into gradients of its hidden states and of the head, and are dropped. The vocabulary may
be cut over the tensor-parallel group.

Shape suffixes: T tokens, H hidden, V this rank's rows of the vocabulary, C a chunk of tokens.
"""

import torch
from torch import Tensor

from model.config import HEAD_CHUNK
from parallel.collectives import max_over, sum_over


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


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, head_VH: Tensor, target_T: Tensor, weight_T: Tensor, group, train: bool):
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        losses = torch.empty(target_T.shape, dtype=dtype, device=hidden_TH.device)
        grad_hidden = torch.empty_like(hidden_TH) if train else None
        grad_head = torch.zeros(head_VH.shape, dtype=losses.dtype, device=head_VH.device) if train else None
        for start in range(0, target_T.numel(), HEAD_CHUNK):
            part = slice(start, start + HEAD_CHUNK)
            logits = (hidden_TH[part] @ head_VH.t()).to(losses.dtype)
            losses[part], probability, column = _chunk_losses(logits, target_T[part], group)
            if not train:
                continue
            rows = (column >= 0).nonzero()[:, 0]
            probability[rows, column[rows]] -= 1
            grad = (probability * weight_T[part, None]).to(hidden_TH.dtype)
            torch.mm(grad, head_VH, out=grad_hidden[part])
            grad_head += grad.t() @ hidden_TH[part]
        if train:
            ctx.save_for_backward(grad_hidden, grad_head.to(head_VH.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weight_T).sum(), losses

    @staticmethod
    def backward(ctx, grad_total: Tensor, _):
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_total.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_head * scale.to(grad_head.dtype), None, None, None, None


def linear_cross_entropy(
    hidden_TH: Tensor, head_VH: Tensor, target_T: Tensor, weight_T: Tensor, group
) -> tuple[Tensor, Tensor]:
    """Weighted sum of next-token cross-entropies, and the cross-entropy of each token (nats, not differentiable).

    Args:
        hidden_TH: states that the head reads. Every tensor-parallel rank has all of them, and gets the gradient of its
            own part of the vocabulary: the gather that brought them sums these.
        head_VH: this rank's rows of the output head.
        target_T: token ids; where the weight is 0 any valid id will do.
        weight_T: weight of each token in the sum, float32.
        group: tensor-parallel group over which the vocabulary is cut.
    """
    # Inside the function gradients are always off, and needs_input_grad says nothing of torch.no_grad().
    train = torch.is_grad_enabled() and (hidden_TH.requires_grad or head_VH.requires_grad)
    return _LinearCrossEntropy.apply(hidden_TH, head_VH, target_T, weight_T, group, train)
