"""Frozen values as plain data and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from moe_evo.config.cluster import ClusterConfig
from moe_evo.config.model import ModelConfig
from moe_evo.config.run import RunConfig
from moe_evo.config.search import EEPConfig, SearchConfig
from moe_evo.config.sweep import GridConfig, SweepConfig
from moe_evo.config.task import TaskConfig
from moe_evo.plain import PlainError, plain, value_of
from moe_evo.records.folder import asdict_plain


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    inner: Inner
    others: tuple[Inner, ...] = ()
    shares: Mapping[str, float] = field(default_factory=dict)
    pair: tuple[int, str] | None = None
    either: int | list[int] = 0
    kind: Literal["a", "b"] = "a"
    path: Path | None = None
    flag: bool = False


VALUE = Outer(Inner("x", (1, 2)), (Inner("y"),), {"z": 1.5}, (3, "w"), [4], "b", Path("p"), True)


def test_a_value_survives_json() -> None:
    assert value_of(Outer, json.loads(json.dumps(plain(VALUE)))) == VALUE


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        SweepConfig(sweep=GridConfig(num_kept=[2, 4])),
        RunConfig(
            model=ModelConfig(sharding="device_map", max_memory={0: "70GiB", "cpu": "9GiB"}, dynamic_skipping=[0.5]),
            tasks=[TaskConfig(data="nli"), TaskConfig(data="syll", split_shares=(0.5, 0.25, 0.25))],
            search=SearchConfig(
                algorithm="eep", num_kept=[4, 3], init={"random": 1, "reap": 2.5}, eep=EEPConfig(sigma=0.1)
            ),
            cluster=ClusterConfig(address="auto", num_gangs=3, resources={"GPU": 1}, labels={"a": "b"}),
        ),
    ],
)
def test_every_config_survives_yaml(config: RunConfig) -> None:
    assert value_of(type(config), yaml.safe_load(yaml.safe_dump(asdict_plain(config)))) == config


def test_what_is_unknown_is_left_out_and_what_is_missing_takes_its_default() -> None:
    assert value_of(Outer, {"inner": {"name": "x", "colour": 1}, "mood": 2}) == Outer(Inner("x"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "inner: is missing"),
        (7, "it: got 7, expected names with values"),
        ({"inner": {"name": 7}}, "inner.name: got 7, expected text"),
        ({"inner": {"name": "x", "sizes": [1, "2"]}}, r"inner.sizes\[1\]: got '2', expected a whole number"),
        ({"inner": {"name": "x", "sizes": 1}}, "inner.sizes: got 1, expected a list of whole numbers"),
        ({"inner": {"name": "x"}, "pair": [1]}, r"pair: got \[1\], expected a list of"),
        ({"inner": {"name": "x"}, "either": "x"}, "either: got 'x', expected a whole number or a list of whole"),
        ({"inner": {"name": "x"}, "kind": "c"}, "kind: got 'c', expected one of 'a', 'b'"),
        ({"inner": {"name": "x"}, "flag": 1}, "flag: got 1, expected true or false"),
        ({"inner": {"name": "x"}, "shares": {"a": None}}, "shares.a: got None, expected a number"),
    ],
)
def test_what_does_not_fit_says_where_and_what_was_expected(data: object, message: str) -> None:
    with pytest.raises(PlainError, match=message):
        value_of(Outer, data)
