"""The lock, the versions that the package knows, pyproject.toml and the README tell the same."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from lock import (
    ROOT,
    TESTED_VERSIONS,
    direct_dependencies,
    known_versions,
    lock_lines,
    locked_versions,
    oldest_version,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

RUN_MAKE_LOCK = "run `make lock`"
EDIT_README = "edit the first section of README.md"
DIRECT = direct_dependencies(development=True)


@pytest.mark.parametrize("requirement", DIRECT, ids=[one.name for one in DIRECT])
def test_every_direct_dependency_is_locked_within_its_range(requirement: Requirement) -> None:
    locked = locked_versions()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(locked), RUN_MAKE_LOCK
    assert Version(oldest_version(requirement)) <= Version(locked)


def test_the_package_knows_the_known_versions() -> None:
    assert json.loads(TESTED_VERSIONS.read_text()) == known_versions(), RUN_MAKE_LOCK


def test_the_lock_is_one_exact_version_a_line_and_no_address() -> None:
    lines = lock_lines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line) for line in lines)
    assert len(locked_versions()) == len(lines), "the same versions for every platform and Python"


def test_another_build_of_torch_fits_beside_the_lock() -> None:
    assert not [name for name in locked_versions() if name.startswith(("nvidia-", "cuda-", "triton", "setuptools"))]


def test_torch_is_held_at_one_version() -> None:
    held = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
    assert held == [f"torch=={locked_versions()['torch']}"], RUN_MAKE_LOCK


def test_the_readme_names_the_tested_versions() -> None:
    first_section = (ROOT / "README.md").read_text().split("\n## ")[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [one.rpartition(" ")[2] for one in project["classifiers"] if re.search(r"Python :: 3\.\d+$", one)]
    assert f"Python {pythons[0]} to {pythons[-1]}" in first_section, EDIT_README
    for name in ("torch", "transformers"):
        assert f"{name} {known_versions()['locked'][name]}" in first_section, EDIT_README
        assert f"{name} {known_versions()['oldest'][name]}" in first_section, EDIT_README
