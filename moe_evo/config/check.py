"""`require`, with which the sections of a config check their values."""

from moe_evo.errors import ConfigError


def require(condition: bool, option: str, got: object, expected: str) -> None:
    """Raise ConfigError unless `condition` holds; says which option, what was got and what was expected."""
    if not condition:
        raise ConfigError(f"{option}: got {got!r}, expected {expected}")
