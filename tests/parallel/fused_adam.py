"""Transformer Engine's FusedAdam as its interface and the bits of its kernel with remainders are known, on a CPU.

`tests/gpu/test_te.py` compares it with the real one.
"""

import sys
from types import ModuleType

import megatron.core.optimizer
import torch
from megatron.core.optimizer import optimizer_config
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW with moments of a type and bfloat16 weights whose further 16 bits it keeps."""

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool,
        capturable: bool,
        master_weights: bool,
        master_weight_dtype: torch.dtype,
        exp_avg_dtype: torch.dtype,
        exp_avg_sq_dtype: torch.dtype,
        use_decoupled_grad: bool,
        store_param_remainders: bool,
    ):
        assert adam_w_mode and not capturable and master_weights and use_decoupled_grad and store_param_remainders
        assert master_weight_dtype == torch.float32 and exp_avg_dtype == exp_avg_sq_dtype
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.dtype = exp_avg_dtype

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        moments = {name: torch.zeros_like(param, dtype=self.dtype) for name in ("exp_avg", "exp_avg_sq")}
        rest = torch.zeros_like(param, dtype=torch.int16) if store_param_remainders else param.detach().clone()
        self.state[param] = moments | {"master_param": rest}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if not self.state[param]:
                    self.initialize_state(param, param.dtype == torch.bfloat16)
                self._update(param, group)

    def _update(self, param: Tensor, group: dict) -> None:
        state, grad = self.state[param], param.decoupled_grad.float()
        (beta1, beta2), steps = group["betas"], group["step"]
        mean = state["exp_avg"].float().lerp(grad, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp(grad.square(), 1 - beta2)
        main = param.float()
        if param.dtype == torch.bfloat16:
            halves = torch.stack(
                [state["master_param"], param.view(torch.int16) - (state["master_param"] < 0).short()], dim=-1
            )
            main = halves.view(torch.float32).squeeze(-1)
        update = (mean / (1 - beta1**steps)) / ((square / (1 - beta2**steps)).sqrt() + group["eps"])
        main = main - group["lr"] * (update + group["weight_decay"] * main)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        if param.dtype == torch.bfloat16:
            rest, upper = main[..., None].view(torch.int16).unbind(-1)
            state["master_param"].copy_(rest)
            param.view(torch.int16).copy_(upper + (rest < 0))
        else:
            param.copy_(main)


def install() -> None:
    """Lets megatron-core find it in this process."""
    parent, package, module = (
        ModuleType(f"transformer_engine{tail}") for tail in ("", ".pytorch", ".pytorch.optimizers")
    )
    vars(module)["FusedAdam"] = FusedAdam
    sys.modules |= {x.__name__: x for x in (parent, package, module)}
    for user in (megatron.core.optimizer, optimizer_config):
        vars(user)["is_te_min_version"] = lambda version: True
    vars(megatron.core.optimizer)["Adam"] = FusedAdam
