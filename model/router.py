"""The router: which experts each token uses, and the loss that keeps their load even.

Scores are a softmax over all experts in float32; a token takes its top k, renormalised to sum to one. The balance
loss is E * sum_i f_i P_i (Qiu et al., "Demons in the Detail", 2025, eq. 2-6) with f_i the share of all assignments
that went to expert i, counted over every data-parallel rank of the micro-batch, and P_i the mean score of expert i.
A perfectly balanced layer scores 1.0.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from model.backends import accelerated
from model.norm import at_least_float32
from parallel.collectives import attach_loss, sum_over


@accelerated("model.kernel_router")
def router_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """hidden W^T in at least float32, the type of the weight: [T, E]."""
    return F.linear(at_least_float32(hidden_TH), weight_EH)


@accelerated("model.kernel_router", lambda logits_TE: logits_TE.is_cuda and logits_TE.dtype == torch.float32)
def route(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k routing. Returns scores [T, E] (softmax), weights [T, K] (renormalised) and experts [T, K] (indices)."""
    scores = logits_TE.softmax(dim=-1)
    top, experts = scores.topk(k, dim=-1)
    return scores, top / top.sum(dim=-1, keepdim=True), experts


def normalise_rows(weight: Tensor, std: float) -> Tensor:
    """Rows of equal norm std * sqrt(columns), so that at the start only the angle to a token decides its scores.

    Csordas, Irie, Schmidhuber, "Approximating Two-Layer Feedforward Networks" (sigma-MoE), 2023, section 5.
    """
    return F.normalize(weight, dim=-1) * std * weight.shape[-1] ** 0.5


def z_loss(logits_TE: Tensor, token_weight_T: Tensor) -> Tensor:
    """This rank's addend of mean_t logsumexp(logits_t)^2, which keeps logits small.

    Zoph et al., "ST-MoE", 2022, eq. 5.
    """
    return token_weight_T.to(logits_TE.dtype) @ logits_TE.logsumexp(dim=-1).square()


class Router(MegatronModule):
    """Replicated on every rank; its weight is float32 whatever the model's type."""

    def __init__(self, config, pg_collection):
        super().__init__(config=config)
        self.num_experts = config.shape.experts
        self.k = config.shape.experts_per_token
        self.balance_weight, self.z_weight = config.balance.weight, config.balance.z_weight
        self.tp_group = pg_collection.tp
        self.balance_group = pg_collection.tp_dp_cp
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, dtype=torch.float32))
        self.weight.sequence_parallel = config.sequence_parallel
        self.losses = []

    def forward(self, hidden_TH: Tensor, token_weight_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [T, K] and expert indices [T, K].

        Args:
            token_weight_T: each token's share of the global batch's mean, 0 for padding; None: no balance loss.
        """
        logits = router_logits(hidden_TH, self.weight)
        scores, weights, experts = route(logits, self.k)
        if token_weight_T is not None and torch.is_grad_enabled():
            balance, z = self.balance_loss(scores, experts, token_weight_T), z_loss(logits, token_weight_T)
            self.losses.append(torch.stack([balance.detach(), z.detach()]))
            weights = attach_loss(weights, self.balance_weight * balance + self.z_weight * z)
        return weights, experts

    def balance_loss(self, scores_TE: Tensor, experts_TK: Tensor, token_weight_T: Tensor) -> Tensor:
        """This rank's addend of E * sum_i f_i P_i: summed over ranks and micro-batches it is the layer's loss."""
        counted = (token_weight_T > 0)[:, None].expand_as(experts_TK)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=scores_TE.device)
        counts.scatter_add_(0, experts_TK.flatten(), counted.flatten().long())
        counts = sum_over(counts, self.balance_group).to(scores_TE.dtype)
        share = counts / counts.sum().clamp(min=1)
        return self.num_experts * (share @ (token_weight_T.to(scores_TE.dtype) @ scores_TE))

    def take_losses(self) -> Tensor:
        """The balance loss and the z-loss gathered since the last call (this rank's part), [2]; forgets them."""
        total = torch.stack(self.losses).sum(dim=0) if self.losses else self.weight.new_zeros(2)
        self.losses.clear()
        return total
