"""Checks that settings of several sections share."""

from train.settings.tree import ConfigError


def check_least(path: str, value: float, least: float) -> None:
    """Raises ConfigError where the setting is below its least value, or no number."""
    if not value >= least:
        raise ConfigError(f"{path}={value} must be at least {least}")


def check_seed(path: str, seed: int) -> None:
    """Raises ConfigError where the seed is not one that every generator of random numbers takes."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"{path}={seed} is no seed: choose a whole number from 0 to {2**63 - 1}")
