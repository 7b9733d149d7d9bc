"""The router: which experts each token uses, and with which weights.

Scores are a softmax over all experts in float32; a token takes its top k, renormalised to sum to one. What keeps the
load of the experts even is in `model.layers.balance`.

Shape suffixes: T tokens, E experts, K experts per token.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional as F

from model.kernels.backends import accelerated
from model.layers.balance import Balance, RoutedTokens
from model.layers.capacity import Capacity
from model.layers.norm import at_least_float32
from model.layers.recompute import in_training
from parallel.collectives import attach_loss


@accelerated("model.kernels.router")
def router_logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """hidden W^T in at least float32, the type of the weight: [T, E]."""
    return F.linear(at_least_float32(hidden_TH), weight_EH)


@accelerated("model.kernels.router", lambda logits_TE: logits_TE.is_cuda and logits_TE.dtype == torch.float32)
def route(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k routing. Returns scores [T, E] (softmax), weights [T, K] (renormalised) and experts [T, K] (indices)."""
    scores = logits_TE.softmax(dim=-1)
    top, experts = scores.topk(k, dim=-1)
    return scores, top / top.sum(dim=-1, keepdim=True), experts


def even_experts(scores_TE: Tensor, k: int) -> Tensor:
    """Experts [T, K] that know nothing of the tokens: each takes the next k, so that all have the same load."""
    tokens, experts = scores_TE.shape
    return (torch.arange(tokens * k, device=scores_TE.device) % experts).view(tokens, k)


def steered_route(logits_TE: Tensor, k: int, bias_E: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `route`, but experts are chosen by score + bias, which their weights do not see; no bias: `even_experts`."""
    scores = logits_TE.softmax(dim=-1)
    experts = even_experts(scores, k) if bias_E is None else (scores + bias_E).topk(k, dim=-1).indices
    top = scores.gather(1, experts)
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
        self.num_experts, self.k = config.shape.experts, config.shape.experts_per_token
        self.z_weight, self.forced = config.balance.z_weight, config.balance.forced
        self.tp_group = pg_collection.tp
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, dtype=torch.float32))
        self.weight.sequence_parallel = config.sequence_parallel
        self.balance = Balance(config, pg_collection)
        share = config.balance.capacity
        self.capacity = None if share is None else Capacity(share, self.num_experts, pg_collection)

    def forward(self, hidden_TH: Tensor, tokens: RoutedTokens | None) -> tuple[Tensor, Tensor]:
        """Weights [T, K] and expert indices [T, K], the number of experts where one is dropped.

        Without ``tokens`` nothing is counted, nothing dropped and no loss attached.
        """
        logits = router_logits(hidden_TH, self.weight)
        if self.forced or self.balance.bias is not None:
            scores, weights, experts = steered_route(logits, self.k, None if self.forced else self.balance.bias)
        else:
            scores, weights, experts = route(logits, self.k)
        if tokens is None:
            return weights, experts
        if self.z_weight and torch.is_grad_enabled():
            weights = attach_loss(weights, self.z_weight * z_loss(logits, tokens.weight_T))
        weights = self.balance(weights, logits, scores, experts, tokens)
        if self.capacity is not None and (in_training() or self.balance.ahead is not None):
            experts = self.capacity.drop(weights.detach(), experts, tokens)
            if torch.is_grad_enabled() and self.balance.recording:
                self.balance.note_dropped(experts == self.num_experts, tokens)
        return weights, experts
