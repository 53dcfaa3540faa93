"""The console of all that is printed: texts from files appear as they are, and never steer the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.measure import Measurement
from rich.segment import Segment

from moe_evo.shown import printable


def screen(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """A console on standard output, standard error or a file, without markup in texts."""
    console = Console(stderr=stderr, file=file, markup=False, emoji=False, highlight=False)
    console.push_render_hook(_Harmless())
    return console


class _Harmless(RenderHook):
    """Writes control characters of what is printed as their numbers; rich adds its own for colours afterwards."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(one) for one in renderables]


class _Printable:
    def __init__(self, content: ConsoleRenderable) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self._content, options):
            yield Segment(text if control else printable(text), style, control)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._content)
