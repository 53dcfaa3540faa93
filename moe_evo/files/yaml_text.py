"""The one reader of YAML: plain data only, and no more of it than somebody would write.

YAML lets a value refer to another one of the same file, or to itself, so that a few bytes can stand for any amount.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from moe_evo.files.limits import LARGEST, MOST_DEPTH
from moe_evo.shown import cut, shown

_MOST_VALUES = 100_000
_MOST_TEXT = 2**22
_KINDS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")
)


class YamlError(ValueError):
    """A text is no YAML; the message is one line, with line and column where there are any."""


class YamlRefused(YamlError):
    """A text is YAML, but of values that no file may hold."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, which counts a value as often as it is referred to; see `yaml_of`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._count(node, 0)
        return self.construct_document(node)

    def _count(self, node: Node, depth: int) -> int:
        """How many values a node stands for; raises YamlRefused for too many, and for what is no plain data."""
        if id(node) in self._open:
            raise YamlRefused(f"a value that holds itself{_place(node)}")
        if depth > MOST_DEPTH:
            raise YamlRefused(f"lists in lists deeper than {MOST_DEPTH}{_place(node)}")
        if id(node) in self._sizes:
            return self._sizes[id(node)]
        if node.tag == "tag:yaml.org,2002:timestamp":
            node.tag = "tag:yaml.org,2002:str"  # no option is a date, but a name may look like one
        if node.tag not in _KINDS:
            raise YamlRefused(f"the tag {cut(node.tag, 80)}{_place(node)}")
        self._open.add(id(node))
        size = 1 + sum(self._count(part, depth + 1) for part in _parts(node))
        self._open.remove(id(node))
        if size > _MOST_VALUES:
            raise YamlRefused(f"more than {_MOST_VALUES:,} values{_place(node)}")
        self._sizes[id(node)] = size
        return size

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key.value for key, _ in node.value if isinstance(key, ScalarNode)]
        if len(set(own)) < len(own) and not any(key.tag.endswith(":merge") for key, _ in node.value):
            twice = next(key for key in own if own.count(key) > 1)
            raise YamlRefused(f"the key {shown(twice, 80)} twice{_place(node)}")
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


_Loader.add_implicit_resolver(  # YAML 1.1 takes a number without a point, such as 1e-5, for a text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def yaml_of(text: str) -> Any:
    """The plain data that a YAML text holds, in which no two values are the same object; raises YamlError.

    Refused are values that hold themselves, more than 100,000 values, where one that is referred to again counts
    again, more than 100 lists in each other, numbers that are not finite or beyond 64 bits, a key that stands twice,
    and tags of other things than plain data. A date is a text.
    """
    if len(text) > _MOST_TEXT:
        raise YamlRefused(f"{len(text):,} characters, expected at most {_MOST_TEXT:,}")
    if "\x00" in text:
        raise YamlRefused("the character NUL, expected text")
    try:
        return _own(yaml.load(text, _Loader))
    except RecursionError as error:
        raise YamlRefused(f"lists in lists deeper than {MOST_DEPTH}") from error
    except yaml.YAMLError as error:
        raise YamlError(cut(" ".join(str(error).split()))) from error
    except UnicodeEncodeError as error:  # libyaml reads UTF-8, which has no halves of characters
        raise YamlRefused(f"half of a character at {error.start}, expected whole characters") from error
    except YamlError:
        raise
    except (ValueError, KeyError, TypeError) as error:  # such as a number of more digits than Python reads, or !!bool x
        raise YamlRefused(f"a value that cannot be read ({cut(str(error), 80)})") from error


def _own(value: Any) -> Any:
    """A copy without anything that is shared, of numbers and texts that can be used."""
    if isinstance(value, dict):
        return {_own_key(key): _own(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_own(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise YamlRefused(f"{value}, expected finite numbers")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        raise YamlRefused(f"{shown(value, 40)}, expected whole numbers of at most 64 bits")
    if isinstance(value, str) and "\x00" in value:
        raise YamlRefused(f"{shown(value, 40)}, expected text without NUL")
    return value


def _own_key(key: Any) -> Any:
    if isinstance(key, list | tuple | dict):
        raise YamlRefused(f"{shown(key, 80)} as a key, expected a name")
    return _own(key)


def _parts(node: Node) -> list[Node]:
    if isinstance(node, SequenceNode):
        return list(node.value)
    return [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else []


def _place(node: Node) -> str:
    mark = node.start_mark
    return f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
