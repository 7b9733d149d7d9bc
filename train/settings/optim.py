"""The optimizer's settings, and their checks."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from data.errors import check_choice
from train.settings.checks import check_least
from train.settings.tree import ConfigError

BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, "peak learning rate"] = 3e-4
    min_lr: Annotated[float, "learning rate at the last step"] = 3e-5
    schedule: Annotated[str, "learning rate after the warm-up: cosine or wsd (stable, then decay)"] = "cosine"
    warmup_steps: Annotated[int, "steps of linear warm-up"] = 0
    decay_fraction: Annotated[float, "wsd: share of run.steps in which the learning rate decays"] = 0.2
    decay_shape: Annotated[str, "wsd: shape of the decay, linear or sqrt (1 - sqrt of its progress)"] = "sqrt"
    betas: Annotated[tuple[float, float], "AdamW's decay rates of the gradient's two moments"] = (0.9, 0.95)
    eps: Annotated[float, "AdamW's epsilon"] = 1e-8
    weight_decay: Annotated[float, "decoupled weight decay"] = 0.1
    moments: Annotated[
        str,
        "type of AdamW's moments: float32, or bfloat16, with 16 bits for what float32 weights have beyond the model's: "
        "6 bytes a number instead of 12 (bfloat16 models on GPUs, Transformer Engine's AdamW)",
    ] = "float32"
    clip: Annotated[float, "largest norm of the whole gradient; 0 does not clip"] = 1.0
    spike_factor: Annotated[
        float,
        "a step is skipped whose loss or gradient norm lies so many standard deviations above the mean of the steps "
        "before it; 0 skips only what is not finite",
    ] = 0.0
    spike_window: Annotated[int, "steps that optim.spike_factor compares with, once there are half of them"] = 128
    rewind_after: Annotated[
        int,
        "skipped steps in a row after which the run goes back to its last checkpoint before them and leaves their "
        "samples out; 0 only skips",
    ] = 5


def check_optim(optim: OptimConfig) -> None:
    """Refuses what cannot be trained with.

    Raises:
        ConfigError: the setting, in one line.
    """
    check_choice("optim.schedule", optim.schedule, ("cosine", "wsd"), ConfigError)
    check_choice("optim.moments", optim.moments, ("float32", BFLOAT16), ConfigError)
    check_choice("optim.decay_shape", optim.decay_shape, ("linear", "sqrt"), ConfigError)
    if not 0 < optim.lr < float("inf"):
        raise ConfigError(f"optim.lr={optim.lr} must be a number above 0")
    if not 0 <= optim.min_lr <= optim.lr:
        raise ConfigError(f"optim.min_lr={optim.min_lr} must lie between 0 and optim.lr={optim.lr}")
    if not 0 < optim.decay_fraction <= 1:
        raise ConfigError(f"optim.decay_fraction={optim.decay_fraction} must lie above 0 and not above 1")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas={list(optim.betas)} must lie from 0 to below 1")
    if not 0 < optim.eps < float("inf"):
        raise ConfigError(f"optim.eps={optim.eps} must be a number above 0")
    if not 0 <= optim.weight_decay < float("inf"):
        raise ConfigError(f"optim.weight_decay={optim.weight_decay} must be a number of at least 0")
    check_least("optim.warmup_steps", optim.warmup_steps, 0)
    check_least("optim.clip", optim.clip, 0.0)
    check_least("optim.spike_factor", optim.spike_factor, 0.0)
    check_least("optim.spike_window", optim.spike_window, 2)
    check_least("optim.rewind_after", optim.rewind_after, 0)


def check_moments(optim: OptimConfig, engine: str, dtype: str) -> None:
    """Raises ConfigError where nothing keeps moments of the type that is asked for."""
    if optim.moments != BFLOAT16:
        return
    for setting, value, needed in (("engine", engine, "megatron"), ("model.dtype", dtype, BFLOAT16)):
        if value != needed:
            raise ConfigError(
                f"optim.moments={optim.moments} is not for {setting}={value}: choose {setting}={needed}, or "
                f"optim.moments=float32"
            )


def require_moments(optim: OptimConfig) -> None:
    """Raises ConfigError where what keeps such moments is not installed, or has no GPU to run on."""
    if optim.moments != BFLOAT16:
        return
    if find_spec("transformer_engine") is None:
        raise ConfigError(
            f"optim.moments={optim.moments} needs Transformer Engine, which is not installed: ./launch.sh setup te, or "
            f"optim.moments=float32"
        )
    import torch  # takes seconds, which a mistake in the settings should not wait for

    if not torch.cuda.is_available():
        raise ConfigError(f"optim.moments={optim.moments} needs a GPU, and there is none: choose optim.moments=float32")
