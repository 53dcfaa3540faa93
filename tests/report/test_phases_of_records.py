"""The phases of a search as a report draws them, whatever search it was."""

from __future__ import annotations

from pathlib import Path

from made_runs import make_run

from moe_evo.records.folder import RunFolder
from moe_evo.report.payload import curve
from moe_evo.report.record import read_records


def phases(run: RunFolder) -> dict[str, tuple[str, int]]:
    """Name: colour, and how many evaluations are drawn in it."""
    drawn = curve(read_records([run.path])[0])
    tones = zip(drawn["phase_names"], drawn["phase_tones"], strict=True)
    return {name: (tone, drawn["phase"].count(place)) for place, (name, tone) in enumerate(tones)}


def with_algorithm(run: RunFolder, algorithm: str) -> RunFolder:
    run.config.write_text(run.config.read_text("utf-8").replace("algorithm: eep", f"algorithm: {algorithm}"), "utf-8")
    return run


def test_the_phases_of_eep_have_their_colours(tmp_path: Path) -> None:
    assert phases(make_run(tmp_path / "run", evaluations=60)) == {
        "initial prunings": ("initial", 15),
        "children of prunings": ("pruning", 15),
        "merging": ("merging", 30),
    }


def test_random_search_only_draws(tmp_path: Path) -> None:
    run = with_algorithm(make_run(tmp_path / "run", evaluations=60), "random")
    assert phases(run) == {"random prunings": ("initial", 60)}


def test_a_run_of_a_search_that_is_not_installed_has_one_phase_under_its_name(tmp_path: Path) -> None:
    run = with_algorithm(make_run(tmp_path / "run", evaluations=60), "'somewhere.else:Climber'")
    assert phases(run) == {"Climber": ("merging", 60)}
