"""Which parameters are decayed, and what the engine's optimizer is given."""

from parallel.engine import AdamW
from train.settings.optim import BFLOAT16, OptimConfig

# Decay rates and time steps are no weights: pulling them to zero would mean a memory of a fixed length.
UNDECAYED = ("A_log", "dt_bias", "bias")


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter: to all, norm weights included, but for `UNDECAYED`."""
    return name.rsplit(".", 1)[-1] not in UNDECAYED


def adamw(optim: OptimConfig) -> AdamW:
    """The optimizer's settings as an engine takes them."""
    return AdamW(optim.betas, optim.eps, optim.weight_decay, optim.clip, halved=optim.moments == BFLOAT16)
