"""Variations that no setting offers, since nobody should train so: each changes the functions of this process alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model import init
from model.layers import balance, norm, router
from train.job import build, optim
from train.watch import gauges
from train.watch.catalog import NORMS


def undecayed_norms() -> None:
    """Norm weights without weight decay, as most train."""
    real = optim.decays

    def decays(name: str) -> bool:
        return real(name) and name.removesuffix(".weight").rpartition(".")[2] not in NORMS

    build.decays = gauges.decays = decays


def plain_norms() -> None:
    """Norm weights that are the gain itself and begin at 1, so that weight decay pulls the gain to 0."""

    def plain(self: Any, x: Tensor) -> Tensor:
        return norm.zero_centred_rms_norm(x, self.weight - 1, self.eps)

    def head(self: Any, x: Tensor | None = None) -> Tensor:
        return self.weight - 1 if x is None else plain(self, x)

    def residual(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm.rms_norm_with_residual(x, self.weight - 1, self.eps)

    def gated(self: Any, x: Tensor, gate: Tensor) -> Tensor:
        return norm.gated_rms_norm(x, gate, self.weight - 1, self.eps)

    norm.ZeroCentredRMSNorm.forward, norm.HeadNorm.forward = plain, head
    norm.ResidualRMSNorm.forward, norm.GatedRMSNorm.forward = residual, gated
    ones = dict.fromkeys(("norm.weight", "layernorm.weight"), lambda shape, of: torch.ones(shape, device=of.device))
    _change_rules(lambda config: ones)
    real = gauges._of_norms
    gauges._of_norms = lambda tops: {name: gain - 1 for name, gain in real(tops).items()}


def router_as_drawn() -> None:
    """Router rows with the norms that they happen to be drawn with."""
    _change_rules(lambda config: {init.ROUTER: init._normal(config.shape.init_std)})


def router_bfloat16() -> None:
    """Router products, scores and the counts of the balance loss rounded to bfloat16."""

    def logits(hidden_TH: Tensor, weight_EH: Tensor) -> Tensor:
        return F.linear(hidden_TH.bfloat16(), weight_EH.bfloat16()).float()

    def route(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        scores = logits_TE.bfloat16().softmax(dim=-1)
        top, experts = scores.topk(k, dim=-1)
        return scores.float(), (top / top.sum(dim=-1, keepdim=True)).float(), experts

    real = balance.load_fractions
    router.router_logits, router.route = logits, route
    balance.load_fractions = lambda counts: real(counts.bfloat16())


def _change_rules(changed: Callable[[Any], dict[str, Callable]]) -> None:
    real = init.rules
    init.rules = lambda config: real(config) | changed(config)


SEAMS = {each.__name__: each for each in (undecayed_norms, plain_norms, router_as_drawn, router_bfloat16)}
