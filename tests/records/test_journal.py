"""The journal: what is written stays, whatever happens, and every trouble is one clear line."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_evo.errors import JournalError
from moe_evo.genomes.genome import Genome, LayerGenome
from moe_evo.genomes.population import Candidate, Evaluation, EvaluationFailure, Individual
from moe_evo.records.journal import Journal

PRUNING = Candidate(0, Genome.from_kept([[0, 3], [1, 2]], 4, 2), "random_pruning")
MERGED = Candidate(
    1,
    Genome((LayerGenome(np.eye(2, 4) + 0.25, np.eye(2, 4), 1), PRUNING.genome.layers[1])),
    "gaussian_mutation",
    (0,),
)
SCORED = Evaluation(0.5, -1.25, 0.03, 300, 0.1, {"nli/accuracy": 0.5})
FAILED = EvaluationFailure("non_finite", "logits are NaN", 0.2)


def test_candidates_and_outcomes_come_back_as_they_were(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.propose("search", [PRUNING, MERGED])
        journal.record([("search", 1, "search", FAILED)])
        journal.record([("search", 0, "search", SCORED)])
        journal.record([("search", 0, "test", SCORED)])
    with Journal(tmp_path / "journal.sqlite") as journal:
        assert journal.candidates("search") == [PRUNING, MERGED]
        assert journal.individuals("search") == [Individual(MERGED, FAILED), Individual(PRUNING, SCORED)]
        assert journal.outcomes("search", "test") == {0: SCORED}
        assert journal.outcomes("random", "search") == {}


def test_scores_of_examples_come_back_and_stopped_evaluations_have_none(tmp_path: Path) -> None:
    scores = {"one": np.array([0.0, 1.0, 1.0]), "other": np.array([-0.25])}
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.propose("search", [PRUNING, MERGED])
        journal.record([("search", 0, "search", Evaluation(0.5, scores=scores))])
        journal.record([("search", 1, "search", Evaluation(0.1, num_examples=2, scores=None))])
    with Journal(tmp_path / "journal.sqlite", read_only=True) as journal:
        complete, stopped = journal.outcomes("search", "search").values()
    assert isinstance(complete, Evaluation) and isinstance(stopped, Evaluation)
    assert stopped.is_stopped and not complete.is_stopped and complete.scores is not None
    assert {name: one.tolist() for name, one in complete.scores.items()} == {
        name: one.tolist() for name, one in scores.items()
    }


def test_no_outcome_is_written_twice_or_without_its_candidate(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.propose("search", [PRUNING])
        journal.record([("search", 0, "search", SCORED)])
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            journal.record([("search", 0, "search", SCORED)])
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
            journal.record([("search", 7, "search", SCORED)])


def test_the_candidates_of_one_ask_are_written_all_or_none(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        with pytest.raises(sqlite3.IntegrityError):
            journal.propose("search", [PRUNING, MERGED, PRUNING])
        assert journal.candidates("search") == []


def test_meta_is_kept_and_replaced(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.set_meta({"hash/model": "a"})
        journal.set_meta({"hash/model": "b"})
        assert journal.meta("hash/model") == "b"
        assert journal.meta("hash/nothing") is None


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.propose("search", [PRUNING])
        with pytest.raises(JournalError, match=f"process {os.getpid()} is working on this run"):
            Journal(tmp_path / "journal.sqlite")
        with Journal(tmp_path / "journal.sqlite", read_only=True) as reader:
            assert reader.candidates("search") == [PRUNING]
    Journal(tmp_path / "journal.sqlite").close()


def test_the_lock_dies_with_a_killed_writer(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib; from moe_evo.records.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    path = tmp_path / "journal.sqlite"
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(JournalError, match=f"process {writer.pid} is working"):
            Journal(path)
        writer.send_signal(signal.SIGKILL)
    Journal(path).close()


def test_a_truncated_journal_gets_a_clear_message(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.propose("search", [PRUNING, MERGED])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(JournalError, match=r"journal.sqlite: .*restore the file from a copy, or start anew"):
        Journal(path)


def test_a_file_that_is_no_journal_gets_a_clear_message(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_text("this is a diary, not a journal" * 100)
    with pytest.raises(JournalError, match="not a readable journal"):
        Journal(path)


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    Journal(path).close()
    database = sqlite3.connect(path)
    database.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    database.commit()
    database.close()
    with pytest.raises(JournalError, match="schema 99, expected 3"):
        Journal(path)


def test_a_locked_database_gets_a_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal._database.execute("PRAGMA busy_timeout = 50")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JournalError, match="database is locked; another program holds it open"):
            journal.propose("search", [PRUNING])
        other.rollback()
        other.close()
        journal.propose("search", [PRUNING])


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.propose("search", [PRUNING])
        journal.record([("search", 0, "search", SCORED)])
        pages = journal._database.execute("PRAGMA page_count").fetchone()[0]
        journal._database.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own SQLITE_FULL
        many = [Candidate(n, MERGED.genome, "gaussian_mutation", (0,)) for n in range(1, 200)]
        with pytest.raises(JournalError, match="full; free space on that disk and run the same command again"):
            journal.propose("search", many)
    with Journal(path) as journal:
        assert journal.individuals("search") == [Individual(PRUNING, SCORED)]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"nowhere: cannot be written .*choose another folder"):
        Journal(tmp_path / "nowhere" / "journal.sqlite")


def test_a_reader_writes_nothing(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.sqlite").close()
    with (
        Journal(tmp_path / "journal.sqlite", read_only=True) as reader,
        pytest.raises(JournalError, match="readonly database"),
    ):
        reader.propose("search", [PRUNING])


def test_a_reader_sees_the_last_whole_transaction_of_a_writer_that_was_killed_within_one(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from moe_evo.records.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "journal.set_meta({'key': 'whole'})\n"
        "database = journal._database\n"
        "database.execute('PRAGMA cache_size = 1'); database.execute('PRAGMA cache_spill = 1')\n"
        "database.execute('BEGIN IMMEDIATE')\n"
        "database.execute(\"UPDATE meta SET value = 'half' WHERE key = 'key'\")\n"
        "rows = [(f'filler{n}', 'x' * 4000) for n in range(200)]\n"
        "database.executemany('INSERT INTO meta VALUES (?, ?)', rows)\n"
        "os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "journal.sqlite"
    subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert path.with_name("journal.sqlite-journal").stat().st_size > 0  # hot: it must be rolled back
    with Journal(path, read_only=True) as reader:
        assert reader.meta("key") == "whole"
        assert reader.meta("filler0") is None


def test_reading_a_journal_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no such journal"):
        Journal(tmp_path / "journal.sqlite", read_only=True)
