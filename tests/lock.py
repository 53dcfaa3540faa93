"""What `make lock` writes beside constraints.txt: the versions of our direct dependencies, for the package to read.

A script that only needs `packaging`; test_lock.py checks with the same functions what is committed.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
TESTED_VERSIONS = ROOT / "moe_evo" / "data" / "tested_versions.json"


def direct_dependencies(*, development: bool) -> list[Requirement]:
    """What pyproject.toml asks for, extras included; the extra `dev` only where it is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra, of_extra in project["optional-dependencies"].items():
        lines += of_extra if development or extra != "dev" else []
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.name != project["name"]]


def lock_lines() -> list[str]:
    """constraints.txt without its comments."""
    return [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]


def locked_versions() -> dict[str, str]:
    """The versions in constraints.txt by name."""
    return dict(line.split(";")[0].strip().split("==") for line in lock_lines())


def oldest_version(requirement: Requirement) -> str:
    """Its lower bound."""
    bounds = [one.version for one in requirement.specifier if one.operator == ">="]
    assert len(bounds) == 1, f"pyproject.toml: {requirement} has no lower bound; `make test-oldest` needs one"
    return bounds[0]


def known_versions() -> dict[str, dict[str, str]]:
    """What tested_versions.json holds: of all that the package imports, the oldest and the locked version."""
    requirements = {canonicalize_name(one.name): one for one in direct_dependencies(development=False)}
    locked = locked_versions()
    return {
        "locked": {name: locked[name] for name in sorted(requirements)},
        "oldest": {name: oldest_version(requirements[name]) for name in sorted(requirements)},
    }


if __name__ == "__main__":
    TESTED_VERSIONS.write_text(json.dumps(known_versions(), indent=2) + "\n")
