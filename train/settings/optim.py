"""The optimizer's settings, and their checks."""

from dataclasses import dataclass

from train.settings.checks import check_choice, check_least
from train.settings.tree import ConfigError, setting


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = setting(3e-4, "peak learning rate")
    min_lr: float = setting(3e-5, "learning rate at the last step")
    schedule: str = setting("cosine", "learning rate after the warm-up: cosine or wsd (stable, then decay)")
    warmup_steps: int = setting(0, "steps of linear warm-up")
    decay_fraction: float = setting(0.2, "wsd: share of run.steps in which the learning rate decays")
    decay_shape: str = setting("sqrt", "wsd: shape of the decay, linear or sqrt (1 - sqrt of its progress)")
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's decay rates of the gradient's two moments")
    eps: float = setting(1e-8, "AdamW's epsilon")
    weight_decay: float = setting(0.1, "decoupled weight decay")
    clip: float = setting(1.0, "largest norm of the whole gradient; 0 does not clip")
    spike_factor: float = setting(
        0.0,
        "a step is skipped whose loss or gradient norm lies so many standard deviations above the mean of the steps "
        "before it; 0 skips only what is not finite",
    )
    spike_window: int = setting(128, "steps that optim.spike_factor compares with, once there are half of them")
    rewind_after: int = setting(
        5,
        "skipped steps in a row after which the run goes back to its last checkpoint before them and leaves their "
        "samples out; 0 only skips",
    )


def check_optim(optim: OptimConfig) -> None:
    """Refuses what cannot be trained with.

    Raises:
        ConfigError: the setting, in one line.
    """
    check_choice("optim.schedule", optim.schedule, ("cosine", "wsd"))
    check_choice("optim.decay_shape", optim.decay_shape, ("linear", "sqrt"))
    if not 0 < optim.lr < float("inf"):
        raise ConfigError(f"optim.lr={optim.lr} must be a number above 0")
    if not 0 <= optim.min_lr <= optim.lr:
        raise ConfigError(f"optim.min_lr={optim.min_lr} must lie between 0 and optim.lr={optim.lr}")
    if not 0 < optim.decay_fraction <= 1:
        raise ConfigError(f"optim.decay_fraction={optim.decay_fraction} must lie above 0 and not above 1")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas={list(optim.betas)} must lie from 0 to below 1")
    if not optim.eps > 0:
        raise ConfigError(f"optim.eps={optim.eps} must be above 0")
    check_least("optim.warmup_steps", optim.warmup_steps, 0)
    check_least("optim.weight_decay", optim.weight_decay, 0.0)
    check_least("optim.clip", optim.clip, 0.0)
    check_least("optim.spike_factor", optim.spike_factor, 0.0)
    check_least("optim.spike_window", optim.spike_window, 2)
    check_least("optim.rewind_after", optim.rewind_after, 0)
