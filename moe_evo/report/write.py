"""Reports about one or several runs: an HTML page, or a comparison as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_evo.errors import RunError
from moe_evo.files.write import write_whole
from moe_evo.records.sweep import run_folders
from moe_evo.report.answers import WrittenReport
from moe_evo.report.html import lines_table, pairings_table, spread_table
from moe_evo.report.lines import Line, sorted_lines
from moe_evo.report.page import is_report, render_page
from moe_evo.report.pairing import Pairing, pairings
from moe_evo.report.record import read_records
from moe_evo.report.spread import Spread, spreads


@dataclass(frozen=True, repr=False)
class Comparison:
    """The final tables of several runs as one sorted list, and each run's winner against that of the first run.

    spread: of the runs that differ only in their seed.
    """

    lines: tuple[Line, ...]
    paired: tuple[Pairing, ...] = ()
    spread: tuple[Spread, ...] = ()

    def __repr__(self) -> str:
        winners = [(line.run, line.test) for line in self.lines if line.key == "best"]
        tests = "; ".join(f"{run} {test:.3f}" for run, test in winners if test is not None)
        return f"<Comparison of {len({line.run for line in self.lines})} runs; winners on the test split: {tests}>"

    def _repr_html_(self) -> str:
        spread = spread_table(self.spread) if self.spread else ""
        return lines_table(self.lines) + spread + (pairings_table(self.paired) if self.paired else "")


def compare(folders: Sequence[str], *, in_pairs: bool = True) -> Comparison:
    """The final tables of runs, and each run's winner against that of the first run.

    folders: of runs, or of sweeps, which stand for their runs. in_pairs: False leaves out the latter, which saves the
    time of the bootstrap. Raises RunError for a folder that holds neither.
    """
    records = read_records(run_folders(folders))
    lines = tuple(sorted_lines(records))
    return Comparison(lines, tuple(pairings(records)) if in_pairs else (), tuple(spreads(lines)))


def write_report(folders: Sequence[str], to: str | None, *, overwrite: bool) -> WrittenReport:
    """Write one HTML page about runs, atomically, and return where it is.

    folders: of runs, or of sweeps, which stand for their runs. to: the file; None means report.html in the only folder.
    overwrite: replace a file even if it is not a report.
    """
    target = _target(folders, to)
    _check_target(target, overwrite=overwrite)
    records = read_records(run_folders(folders))
    # names of folders may have bytes that are not text, which become question marks
    text = render_page(records).encode("utf-8", "replace").decode("utf-8")
    _write(target, text)
    return WrittenReport(
        report=str(target),
        bytes=target.stat().st_size,
        runs=len(records),
        unfinished=tuple(str(record.folder) for record in records if not record.is_finished),
    )


def _target(folders: Sequence[str], to: str | None) -> Path:
    if to is not None:
        return Path(to)
    if len({Path(folder).resolve() for folder in folders}) > 1:
        raise RunError(f"--to: got none for {len(folders)} runs, expected a file such as --to report.html")
    return Path(folders[0]) / "report.html"


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Raise RunError where another file would be overwritten, or the file cannot be written; reads no run."""
    if target.is_dir():
        raise RunError(f"{target}: is a folder, expected a file such as {target / 'report.html'}")
    if overwrite or not target.exists():
        return
    try:
        with target.open("rb") as file:
            head = file.read(4096).decode("utf-8", "replace")
    except OSError as error:
        raise RunError(f"{target}: cannot be read ({error.strerror}); give another file with --to") from error
    if not is_report(head):
        raise RunError(f"{target}: is there and is no report; give another file, or --overwrite to replace it")


def _write(target: Path, text: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
    except OSError as error:
        raise RunError(f"{target}: cannot be written ({error.strerror}); give another file with --to") from error
