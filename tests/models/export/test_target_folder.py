"""An export takes the place of an older one, and of nothing else: not of files of the user's, nor of a link."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_evo.errors import ExportError
from moe_evo.models.export import target_folder
from moe_evo.models.export.target_folder import EXPORT_RECORD, written_beside

OURS = {"config.json": "{}", "model.safetensors": "weights", "odd_vocabulary.bin": "tokens"}


def _export(folder: Path, **changes: str) -> None:
    with written_beside(folder) as temporary:
        for name, text in (OURS | changes).items():
            (temporary / name).write_text(text)
        (temporary / EXPORT_RECORD).write_text('{"base_model": "tiny"}')


def _files(folder: Path) -> dict[str, str]:
    files = [one for one in folder.rglob("*") if one.is_file() and one.name != EXPORT_RECORD]
    return {one.relative_to(folder).as_posix(): one.read_text() for one in files}


@pytest.fixture(params=["at once", "one after the other"])
def moves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the file system lets two folders change places."""
    if request.param != "at once":
        monkeypatch.setattr(target_folder, "_exchanged", lambda *_: False)
    return str(request.param)


def test_this_file_system_lets_two_folders_change_places(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert target_folder._exchanged(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()


def test_the_record_has_every_file(tmp_path: Path) -> None:
    _export(tmp_path / "small")
    record = json.loads((tmp_path / "small" / EXPORT_RECORD).read_text())
    assert record == {"base_model": "tiny", "files": sorted([*OURS, EXPORT_RECORD])}


def test_files_that_no_export_wrote_are_kept(tmp_path: Path, moves: str) -> None:
    folder = tmp_path / "small"
    _export(folder)
    (folder / "notes.md").write_text("mine")
    (folder / "results" / "deep").mkdir(parents=True)
    (folder / "results" / "deep" / "table.csv").write_text("1,2")
    (folder / "link").symlink_to("notes.md")
    (folder / "moe_evo").mkdir()
    (folder / "moe_evo" / "genome.safetensors").write_text("of the old export")
    with written_beside(folder) as temporary:
        (temporary / "config.json").write_text("new")
    assert _files(folder) == {"config.json": "new", "notes.md": "mine", "link": "mine", "results/deep/table.csv": "1,2"}
    assert (folder / "link").is_symlink()
    assert [one.name for one in tmp_path.iterdir()] == ["small"]


def test_of_an_older_export_without_a_list_the_usual_files_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    _export(folder)
    (folder / EXPORT_RECORD).write_text("{}")
    with written_beside(folder) as temporary:
        (temporary / "config.json").write_text("new")
    assert _files(folder) == {"config.json": "new", "odd_vocabulary.bin": "tokens"}


def test_a_file_of_the_users_whose_name_the_new_export_needs_is_not_lost(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    _export(folder)
    (folder / "chat_template.jinja").write_text("mine")
    before = _files(folder)
    with pytest.raises(ExportError, match=r"chat_template\.jinja: was not written by an export.*move it elsewhere"):
        _export(folder, **{"chat_template.jinja": "new"})
    assert _files(folder) == before and [one.name for one in tmp_path.iterdir()] == ["small"]


def test_a_link_stays_a_link(tmp_path: Path, moves: str) -> None:
    _export(tmp_path / "disk" / "small")
    (tmp_path / "link").symlink_to(Path("disk") / "small")
    _export(tmp_path / "link", **{"config.json": "new"})
    assert (tmp_path / "link").is_symlink()
    assert _files(tmp_path / "disk" / "small")["config.json"] == "new"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk", "link"]


def test_an_export_that_was_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    _export(folder)
    folder.rename(tmp_path / ".small.abcdefgh.old")
    with pytest.raises(ZeroDivisionError), written_beside(folder):
        assert _files(folder) == OURS
        1 / 0  # noqa: B018
    assert _files(folder) == OURS and [one.name for one in tmp_path.iterdir()] == ["small"]


def test_what_only_looks_like_an_export_that_was_moved_aside_stays(tmp_path: Path) -> None:
    mine = tmp_path / ".small.abcdefgh.old"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    _export(tmp_path / "small")
    assert (mine / "thesis.tex").read_text() == "precious"
