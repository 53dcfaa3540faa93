"""Tells how many wrong inputs were tried, below the results of the tests."""

from __future__ import annotations

import pytest
from nonsense import TRIED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIED:
        terminalreporter.write_line(f"{sum(TRIED.values()):,} wrong inputs tried")
