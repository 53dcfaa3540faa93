"""Bounds on what is taken from a file: far above what anybody writes, and below what makes a process hang."""

from __future__ import annotations

MOST_DEPTH = 100
"""Lists and objects in each other."""

LARGEST = 2**63 - 1
"""The largest whole number: what SQLite, numpy and torch can hold."""

MOST_UNPACKED = 2**29
"""Bytes of one stored genome or one evaluation's scores, uncompressed: 100 layers of 800 experts."""

MOST_UNPACKED_FILE = 2**31
"""Bytes of one file of rows, uncompressed."""
