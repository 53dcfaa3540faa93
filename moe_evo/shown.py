"""How values and texts that come from outside are shown: cut where they are long, and without control characters.

A file can hold escape sequences that would move the cursor or change colours of a terminal, and values of any length.
"""

from __future__ import annotations

import re
from html import escape

_MOST = 200
_MOST_OF_MESSAGE = 2000
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, marks that turn the direction of writing, and halves of characters."""


def shown(value: object, most: int = _MOST) -> str:
    """A value as Python writes it, cut after so many characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        text = f"a whole number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return cut(printable(text), most)


def cut(text: str, most: int = _MOST) -> str:
    """A text, without its end where it is longer."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """The text with every control character but tab and line feed written as its number, such as \\x1b."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def in_html(text: str) -> str:
    """The text for an HTML page: as it is, not as markup."""
    return escape(printable(text))


def one_line(text: object) -> str:
    """A text without line ends."""
    return printable(" ".join(str(text).split()))


def line_of(text: object) -> str:
    """A message as one line of a terminal; of a very long one the middle is left out."""
    line = one_line(text)
    if len(line) <= _MOST_OF_MESSAGE:
        return line
    return f"{line[: _MOST_OF_MESSAGE - 405]} ... {line[-400:]}"
