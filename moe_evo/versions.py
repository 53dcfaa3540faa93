"""The versions of other packages: what is installed, what the tests ran with, and what is newer than that."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ADVICE = "install the tested versions (README, 'Two commands'), or a newer moe_evo"
"""Advice in the error message where another package does not behave as expected."""


@cache
def tested_versions() -> Mapping[Literal["locked", "oldest"], Mapping[str, str]]:
    """Versions that the tests pass with, by package: those of the lock file, and the oldest ones."""
    text = (files("moe_evo") / "data" / "tested_versions.json").read_text("utf-8")
    found: Mapping[Literal["locked", "oldest"], Mapping[str, str]] = json.loads(text)
    return found


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def needed_packages() -> Mapping[str, str | None]:
    """The packages that moe_evo depends on, each with the extra that needs it; None: every installation needs it."""
    needed: dict[str, str | None] = {}
    for line in requires("moe_evo") or ():
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed[name] = None
        elif extra := re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker)):
            needed.setdefault(name, extra[1].replace("-", "_"))
    return {package: extra for package, extra in needed.items() if package in tested_versions()["locked"]}


def release(version: str) -> tuple[int, ...]:
    """(5, 24, 0) of '5.24.0rc1' or '5.24.0+cpu'."""
    return Version(version).release


def newer_than_tested() -> str:
    """One line with the imported packages whose minor version is newer than the tested one; '' where there are none."""
    found = []
    for package, locked in tested_versions()["locked"].items():
        installed = installed_version(package) if package in sys.modules else None
        if installed is not None and release(installed)[:2] > release(locked)[:2]:
            found.append(f"{package} {installed} (tested: {locked})")
    if not found:
        return ""
    return f"newer than tested: {', '.join(found)}; if something breaks, {ADVICE}"
