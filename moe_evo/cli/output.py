"""Output where the terminal's encoding has not every character, as with LC_ALL=C: it is written in ASCII instead."""

from __future__ import annotations

import codecs
import sys
import unicodedata

_NAME = "moe_evo.ascii"
_ASCII = {
    "█": "#", "▓": "%", "▒": "+", "░": ".", "│": "|", "─": "-", "━": "-", "╸": "-", "╺": "-", "–": "-", "—": "-",
    "‑": "-", "…": "...", "×": "x", "→": "->", "≤": "<=", "≥": ">=", "±": "+-", "·": ".", "•": "*", "’": "'", "‘": "'",
    "“": '"', "”": '"', "\u00a0": " ",
}  # fmt: skip


def write_any_character() -> None:
    """Let standard output and error write what their encoding cannot hold as ASCII that looks like it."""
    codecs.register_error(_NAME, _as_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # which a stream of a notebook does not have
        if reconfigure is not None and not str(stream.encoding).lower().startswith("utf"):
            reconfigure(errors=_NAME)


def _as_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_similar, error.object[error.start : error.end])), error.end


def _similar(character: str) -> str:
    """ASCII in place of a character: what looks like it, the letter without its accent, or the number."""
    plain = _ASCII.get(character) or unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return plain or character.encode("ascii", "backslashreplace").decode("ascii")
