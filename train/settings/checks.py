"""Checks that settings of several sections share."""

import re

from data.secrets import names_secret
from train.settings.tree import ConfigError

VARIABLE = r"[A-Za-z_]\w*"  # a name of the environment


def check_least(path: str, value: float, least: float) -> None:
    """Raises ConfigError where the setting is below its least value, or no number."""
    if not value >= least:
        raise ConfigError(f"{path}={value} must be at least {least}")


def check_seed(path: str, seed: int) -> None:
    """Raises ConfigError where the seed is not one that every generator of random numbers takes."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"{path}={seed} is no seed: choose a whole number from 0 to {2**63 - 1}")


def check_environment(given: tuple[str, ...]) -> None:
    """Raises ConfigError where run.environment holds what sets no variable, or a secret."""
    for text in given:
        name, equals, _ = text.partition("=")
        if not equals or not re.fullmatch(VARIABLE, name):
            raise ConfigError(f"run.environment has {text!r}, which sets nothing: write NAME=VALUE")
        if names_secret(name):
            raise ConfigError(f"run.environment sets {name}, and settings are written down: export it instead")
