"""What the documentation names exists: files, headings, commands and options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from moe_evo.cli.parsers import PARSERS
from moe_evo.config.task import TaskConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
    *sorted((ROOT / "cluster").rglob("*.md")),
]
OF_EVERY_COMMAND = {"--json", "--debug", "--help"}

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text("utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every `moe-evo ...`, in blocks and within sentences."""
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", without_blocks(text))
    for line in [*lines, *spans]:
        if re.match(r"\s*moe-evo( |$)", line):
            yield shlex.split(line, comments=True)[1:]


@cache
def options(command: str) -> set[str]:
    of_tasks = {f"--tasks.{field.name}" for field in fields(TaskConfig)}
    known = {f"--{name}" for name in PARSERS[command]().options} | OF_EVERY_COMMAND
    return known | of_tasks | {"--tasks.help"} if "--tasks" in known else known


def named_options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if word.startswith("--")}


@each_page
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text("utf-8"))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"](docs/{page.name}" not in readme] == []


@each_page
def test_every_command_and_its_options_exist(page: Path) -> None:
    for words in command_lines(page.read_text("utf-8")):
        command = words[0] if words else "--help"
        if command in OF_EVERY_COMMAND:
            continue
        assert command in PARSERS, words
        assert named_options(words) <= options(command), words


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")], ids=lambda page: page.name
)
def test_every_option_within_a_sentence_is_one_of_some_command(page: Path) -> None:
    known = set().union(*map(options, PARSERS))
    for span in re.findall(r"`(--[^`]+)`", without_blocks(page.read_text("utf-8"))):
        assert named_options(shlex.split(span)) <= known, span
