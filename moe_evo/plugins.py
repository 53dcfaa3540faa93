"""Registries, by which configs name searches, tasks, metrics and the like, and other packages add their own.

A name is looked up in this order: built in; registered in this process; `package.module:name`; entry point of an
installed package. Entry points are read only for a name that is none of the others, as that takes time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import Any, Generic, TypeVar

from moe_evo.errors import ConfigError

Thing = TypeVar("Thing")
Registered = TypeVar("Registered")

_PATH = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
_registering_modules: dict[str, None] = {}


class Registry(Generic[Thing]):
    """Objects of one kind by name, such as all searches.

    noun: the kind, as error messages call it. groups: names of entry point groups. builtin: the objects of this
    package. problem: returns in words what is wrong with an object of another package, or None. takes_paths: whether a
    name may be `package.module:name`; False where names come from files of other people, which could then import
    any code. hint: end of the error message about an unknown name.

    Iteration gives the names that are built in or registered, without reading entry points; `names` has those, too.

    >>> from moe_evo.searches.registry import SEARCHES
    >>> @SEARCHES.register("mine")
    ... class MySearch:
    ...     def __init__(self, space, config): ...
    >>> SEARCHES["mine"] is MySearch
    True

    Another package registers an object in its pyproject.toml:

        [project.entry-points."moe_evo.searches"]
        mine = "my_package.my_module:MySearch"
    """

    def __init__(
        self,
        noun: str,
        groups: Sequence[str],
        builtin: Mapping[str, Thing],
        problem: Callable[[Any], str | None],
        *,
        takes_paths: bool = True,
        hint: str = "",
    ) -> None:
        self.noun = noun
        self.groups = tuple(groups)
        self._builtin = dict(builtin)
        self._problem = problem
        self._takes_paths = takes_paths
        self._hint = hint
        self._registered: dict[str, Thing] = {}
        self._loaded: dict[str, Thing] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator (or function to call with an object) that registers the object by a name in this process.

        Processes of a gang import the module that called it, unless that is `__main__`. Raises ConfigError for a name
        that is built in.
        """
        if name in self._builtin:
            raise ConfigError(f"{self.noun}: got the name {name!r} of one that is built in, expected another one")
        _registering_modules[sys._getframe(1).f_globals["__name__"]] = None

        def remember(thing: Registered) -> Registered:
            self._registered[name] = self._sound(name, thing, self.noun)
            return thing

        return remember

    def get(self, name: str, option: str = "", also: Sequence[str] = ()) -> Thing:
        """The object of this name; raises ConfigError where it is unknown, cannot be imported or is of another kind.

        option: where the name was given, such as an option, for the error message. also: see `check`.
        """
        self.check(name, option, also)
        for known in (self._builtin, self._registered, self._loaded):
            if name in known:
                return known[name]
        self._loaded[name] = self._sound(name, self._imported(name, option), option or self.noun)
        return self._loaded[name]

    def check(self, name: str, option: str = "", also: Sequence[str] = ()) -> None:
        """Raise ConfigError for an unknown name; imports nothing.

        also: other values that the option takes, for the error message.
        """
        if name in self:
            return
        names = list(dict.fromkeys([*also, *self.names()]))
        near = get_close_matches(name, names, n=1)
        meant = f", did you mean {near[0]!r}? expected" if near else ", expected"
        path = ", or package.module:name" if self._takes_paths else ""
        raise ConfigError(f"{option or self.noun}: got {name!r}{meant} one of {', '.join(names)}{path}{self._hint}")

    def names(self) -> list[str]:
        """All names, with those of entry points."""
        return list(dict.fromkeys([*self, *(entry.name for entry in self._entries())]))

    def __getitem__(self, name: str) -> Thing:
        return self.get(name)

    def __contains__(self, name: str) -> bool:
        if name in self._builtin or name in self._registered or name in self._loaded:
            return True
        if ":" in name:
            return self._takes_paths and _PATH.fullmatch(name) is not None
        return any(entry.name == name for entry in self._entries())

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def keys(self) -> list[str]:
        return list(self)

    def values(self) -> ValuesView[Thing]:
        return self._known().values()

    def items(self) -> ItemsView[str, Thing]:
        return self._known().items()

    def _known(self) -> dict[str, Thing]:
        return {**self._builtin, **self._registered}

    def _entries(self) -> list[EntryPoint]:
        return [entry for group in self.groups for entry in entry_points(group=group)]

    def _imported(self, name: str, option: str) -> Any:
        """The object that a `package.module:name` or an entry point refers to."""
        path = _PATH.fullmatch(name)
        if path is None:
            found = {entry.value: entry for entry in self._entries() if entry.name == name}
            if len(found) > 1:
                raise ConfigError(
                    f"{option or self.noun}: {name!r} is in several packages, {' and '.join(found)}; give one of these"
                )
            path = _PATH.fullmatch(next(iter(found)).replace(" ", ""))
        where = name if path is None else path[0]
        try:
            if path is None:
                raise ValueError("an entry point is package.module:name")
            return attrgetter(path[2])(import_module(path[1]))
        except Exception as error:  # the code of others may raise anything while it is imported
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{option or self.noun}: the {self.noun} {name!r} cannot be imported from {where} "
                f"({type(error).__name__}: {reason}); install its package, or put its folder into PYTHONPATH"
            ) from error

    def _sound(self, name: str, thing: Any, option: str) -> Any:
        problem = self._problem(thing)
        if problem is not None:
            raise ConfigError(f"{option}: {name!r} is no {self.noun}: {problem}")
        return thing


def lacking(thing: Any, members: Sequence[str], protocol: str) -> str | None:
    """The members of a protocol that an object does not have, in words; None where it has all."""
    missing = [name for name in members if not hasattr(thing, name)]
    kind = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    return f"{kind} has no {', no '.join(missing)}, expected a {protocol}" if missing else None


def registering_modules() -> tuple[str, ...]:
    """The modules that registered something, for other processes to import; without `__main__`."""
    return tuple(name for name in _registering_modules if name != "__main__")


def import_modules(names: Sequence[str]) -> None:
    """Import modules that register something; raises ConfigError where one cannot be imported."""
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # the code of others may raise anything while it is imported
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the module {name}, which registers a plug-in, cannot be imported here ({type(error).__name__}: "
                f"{reason}); install it on every node"
            ) from error
