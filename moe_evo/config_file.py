"""From YAML files and flags to a checked `RunConfig`; whatever is wrong with them becomes one line."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from moe_evo.config import RunConfig, ScoringConfig
from moe_evo.errors import ConfigError

Config = TypeVar("Config", bound=ScoringConfig)


def config_parser(command: str, usage: str, description: str, config: type[ScoringConfig]) -> ArgumentParser:
    """A parser with --config and one flag for every key of `config`."""
    parser = ArgumentParser(prog=f"moe-evo {command}", usage=usage, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; may also be given first, without --config")
    parser.add_class_arguments(config, None, as_group=False)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse and instantiate; raises ConfigError in one line."""
    try:
        parsed: Namespace = parser.instantiate(parser.parse_args(list(argv)))
    except ArgumentError as error:
        files = [word for flag, word in pairwise(argv) if flag == "--config"]
        where = f" (config {', '.join(files)})" if files else ""
        raise ConfigError(" ".join(str(error).split()) + where) from error
    return parsed


def config_of(arguments: Namespace, config: type[Config]) -> Config:
    """The config among parsed arguments."""
    return config(**{one.name: getattr(arguments, one.name) for one in fields(config)})


def read_config(path: Path) -> RunConfig:
    """The config in a YAML file; raises ConfigError."""
    return config_of(parse(config_parser("", "", "", RunConfig), ["--config", str(path)]), RunConfig)


def scoring_part(path: Path) -> str:
    """What of a run's YAML file it takes to score a genome, as YAML text; raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, expected sections such as model and tasks")
    only_of_runs = {one.name for one in fields(RunConfig)} - {one.name for one in fields(ScoringConfig)}
    return yaml.safe_dump({key: value for key, value in content.items() if key not in only_of_runs})
