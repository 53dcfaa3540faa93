"""The journal of a run: one SQLite file with all candidates and outcomes, from which a run can be continued.

A candidate is written when it is proposed, and an outcome before the search is told of it; each write is a
transaction. One process writes, and holds a file lock that is released when it ends. Any number may read.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moe_evo.errors import GenomeError, JournalError
from moe_evo.files.json_text import json_of
from moe_evo.genomes.file import genome_from_bytes
from moe_evo.genomes.genome import Genome
from moe_evo.genomes.population import Candidate, Individual, Outcome
from moe_evo.plain import Plain, value_of
from moe_evo.records.journal_rows import (
    ancestry_of,
    candidate_columns,
    candidate_of,
    gang_event_of,
    number_of,
    outcome_columns,
    outcome_of,
)
from moe_evo.records.lock import lock
from moe_evo.shown import line_of

SCHEMA_VERSION = "3"

MAIN, RANDOM, REFERENCE = "search", "random", "reference"
"""Names of searches in a journal. REFERENCE has the candidates that no search proposed, such as the full model."""

RECOVERED = "recovered"
"""In place of a split: outcomes on the validation split of finalists that learned from the full model before."""

RECOVERY_COST = "recovered finalists/evaluations"
"""The key under which a journal has how many evaluations of the budget go into recovering finalists."""

_TOLD = "search = ? AND (split = 'search' OR split GLOB 'search/*')"
_FEWEST_GAPS = 3

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE candidates (
    search TEXT NOT NULL, number INTEGER NOT NULL, digest TEXT NOT NULL, operator TEXT NOT NULL,
    parents TEXT NOT NULL, genome BLOB NOT NULL, PRIMARY KEY (search, number)
);
CREATE TABLE outcomes (
    position INTEGER PRIMARY KEY, search TEXT NOT NULL, number INTEGER NOT NULL, split TEXT NOT NULL,
    fitness REAL, tie_break REAL, standard_error REAL, num_examples INTEGER, metrics TEXT,
    scores BLOB, failure_kind TEXT, failure_reason TEXT, duration_s REAL NOT NULL, finished_at REAL NOT NULL,
    UNIQUE (search, number, split),
    FOREIGN KEY (search, number) REFERENCES candidates (search, number)
);
CREATE TABLE gang_events (at REAL NOT NULL, gang INTEGER NOT NULL, kind TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE pool_status (at REAL NOT NULL, status TEXT NOT NULL);
"""


class Journal:
    """An open journal; use it as a context manager.

    A journal holds several named searches (`search`): the run's own and those that it is compared with.
    Within one search, candidates are numbered from 0, and a candidate has at most one outcome a split. What is called
    `split` may also be the name of a `Sample` of a split, which counts as a split of its own.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._lock = None if read_only else lock(path.with_suffix(".lock"), JournalError)
        try:
            self._database = self._open(read_only=read_only)
        except BaseException:
            self._unlock()
            raise

    def _open(self, *, read_only: bool) -> sqlite3.Connection:
        existed = self.path.exists()
        if read_only and not existed:
            raise JournalError(f"{self.path}: no such journal; give the folder of a run")
        with _explained(self.path):
            # rw, not ro: a reader, too, may have to roll back the unfinished transaction of a killed writer.
            uri = f"{self.path.resolve().as_uri()}?mode={'rw' if read_only else 'rwc'}"
            database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=5.0)
            database.execute(f"PRAGMA query_only = {'ON' if read_only else 'OFF'}")
            database.execute("PRAGMA foreign_keys = ON")
            # FULL: an outcome is on disk when `record` returns. The rollback journal, not WAL, as
            # run folders may lie on network storage.
            database.execute("PRAGMA synchronous = FULL")
            if existed and database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._check(database)
            else:
                with _transaction(database):
                    for statement in _SCHEMA.split(";\n"):
                        database.execute(statement)
                    database.execute("INSERT INTO meta VALUES ('schema', ?)", (SCHEMA_VERSION,))
        return database

    def _check(self, database: sqlite3.Connection) -> None:
        verdict = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise JournalError(f"{self.path}: the journal is damaged ({verdict}); {_RESTORE}")
        row = database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if row is None or row[0] != SCHEMA_VERSION:
            raise JournalError(
                f"{self.path}: schema {row and row[0]}, expected {SCHEMA_VERSION}; "
                "use the moe_evo version that wrote this run"
            )

    def close(self) -> None:
        self._database.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def meta(self, key: str) -> str | None:
        rows = self._fetch("SELECT value FROM meta WHERE key = ?", (key,))
        return str(rows[0][0]) if rows else None

    @property
    def recovery_cost(self) -> int:
        """The evaluations of the budget that go into recovering finalists."""
        with self._readable():
            return int(self.meta(RECOVERY_COST) or 0)

    def set_meta(self, values: Mapping[str, str]) -> None:
        if not values:
            return
        with self._write() as database:
            database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    @property
    def has_evaluations(self) -> bool:
        """Whether any candidate was evaluated successfully."""
        return bool(self._fetch("SELECT 1 FROM outcomes WHERE failure_kind IS NULL LIMIT 1", ()))

    @property
    def is_empty(self) -> bool:
        """Whether the journal has no candidate and no event of a gang."""
        return not self._fetch("SELECT 1 FROM candidates UNION ALL SELECT 1 FROM gang_events LIMIT 1", ())

    def clear(self) -> None:
        """Delete everything; only for a run in which no candidate was evaluated successfully."""
        assert not self.has_evaluations, "finished evaluations are never thrown away"
        with self._write() as database:
            database.execute("DELETE FROM outcomes")
            database.execute("DELETE FROM candidates")
            database.execute("DELETE FROM gang_events")
            database.execute("DELETE FROM pool_status")
            database.execute("DELETE FROM meta WHERE key != 'schema'")

    def propose(self, search: str, candidates: Sequence[Candidate]) -> None:
        """Write the candidates of one `ask` in one transaction."""
        rows = [candidate_columns(search, one) for one in candidates]
        with self._write() as database:
            database.executemany("INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?)", rows)

    def record(self, outcomes: Sequence[tuple[str, int, str, Outcome]]) -> None:
        """Write outcomes as (search, number, split, outcome), together; they are on disk when this returns."""
        now = time.time()
        rows = [(*key, *outcome_columns(outcome), outcome.duration_s, now) for *key, outcome in outcomes]
        with self._write() as database:
            database.executemany(
                "INSERT INTO outcomes (search, number, split, fitness, tie_break, standard_error, num_examples,"
                " metrics, scores, failure_kind, failure_reason, duration_s, finished_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

    def record_pool(self, events: Sequence[tuple[float, int, str, str]], status: Mapping[str, object]) -> None:
        """Write events of gangs, as (seconds since the epoch, gang, kind, detail), and the gangs' present status."""
        with self._write() as database:
            database.executemany("INSERT INTO gang_events VALUES (?, ?, ?, ?)", events)
            database.execute("DELETE FROM pool_status")
            database.execute("INSERT INTO pool_status VALUES (?, ?)", (time.time(), json.dumps(status)))

    def gang_events(self) -> list[tuple[float, int, str, str]]:
        """All events of gangs in order, in the form that `record_pool` takes."""
        rows = self._fetch("SELECT at, gang, kind, detail FROM gang_events ORDER BY rowid", ())
        with self._readable():
            return list(map(gang_event_of, rows))

    def pool_status(self) -> Plain | None:
        """The last status of the gangs that was written; None for a run without gangs."""
        rows = self._fetch("SELECT status FROM pool_status ORDER BY rowid DESC LIMIT 1", ())
        with self._readable():
            return value_of(dict[str, Any], json_of(value_of(str, rows[0][0])), "pool_status") if rows else None

    def candidates(self, search: str) -> list[Candidate]:
        """All candidates of a search in the order of their numbers."""
        rows = self._fetch(
            "SELECT number, genome, digest, operator, parents FROM candidates WHERE search = ? ORDER BY number",
            (search,),
        )
        with self._readable():
            return [candidate_of(*columns) for columns in rows]

    def ancestry(self, search: str) -> dict[int, tuple[str, tuple[int, ...]]]:
        """Operator and parents of every candidate by its number, without its genome."""
        rows = self._fetch("SELECT number, operator, parents FROM candidates WHERE search = ?", (search,))
        with self._readable():
            return {number_of(number): ancestry_of(operator, parents) for number, operator, parents in rows}

    def genome(self, search: str, number: int) -> Genome:
        """The genome of one candidate."""
        rows = self._fetch("SELECT genome FROM candidates WHERE search = ? AND number = ?", (search, number))
        with self._readable():
            return genome_from_bytes(value_of(bytes, rows[0][0], "genome"))

    def splits(self, search: str) -> list[str]:
        """Those on which candidates of a search have outcomes."""
        rows = self._fetch("SELECT DISTINCT split FROM outcomes WHERE search = ?", (search,))
        with self._readable():
            return [value_of(str, name, "split") for (name,) in rows]

    def outcomes(self, search: str, split: str) -> dict[int, Outcome]:
        """Outcomes by candidate number, in the order in which they finished."""
        return self._outcomes("search = ? AND split = ?", (search, split))

    def finished(self) -> list[tuple[str, str, str, int]]:
        """(digest, split, search, number) of all outcomes in the order in which they finished, but for evaluations that
        were stopped early.
        """
        return self._fetch(
            "SELECT digest, split, search, number FROM outcomes JOIN candidates USING (search, number)"
            " WHERE scores IS NOT NULL OR failure_kind IS NOT NULL ORDER BY position",
            (),
        )

    def outcome(self, search: str, number: int, split: str) -> Outcome:
        """One outcome that is known to be there."""
        return self._outcomes("search = ? AND number = ? AND split = ?", (search, number, split))[number]

    def told(self, search: str) -> dict[int, Outcome]:
        """The outcomes by which a search goes: on the search split or, each candidate's own, on a sample of it."""
        return self._outcomes(_TOLD, (search,))

    def num_told(self, search: str) -> int:
        """The number of outcomes that `told` returns."""
        return int(self._fetch(f"SELECT count(*) FROM outcomes WHERE {_TOLD}", (search,))[0][0])

    def pace_s(self, search: str) -> float | None:
        """The seconds between two outcomes that `told` returns; None where there are too few to tell.

        A mean without the longest twentieth of the gaps, in which the run may have been interrupted.
        """
        rows = self._fetch(f"SELECT finished_at FROM outcomes WHERE {_TOLD} ORDER BY position", (search,))
        gaps = sorted(later - earlier for (earlier,), (later,) in pairwise(rows))
        kept = gaps[: len(gaps) - max(len(gaps) // 20, 1)]
        return sum(kept) / len(kept) if len(kept) >= _FEWEST_GAPS and sum(kept) > 0 else None

    def _outcomes(self, condition: str, arguments: tuple[object, ...]) -> dict[int, Outcome]:
        rows = self._fetch(
            "SELECT number, split, fitness, tie_break, standard_error, num_examples, metrics, scores, failure_kind,"
            f" failure_reason, duration_s FROM outcomes WHERE {condition} ORDER BY position",
            arguments,
        )
        with self._readable():
            return {number_of(number): outcome_of(split, columns) for number, split, *columns in rows}

    def individuals(self, search: str, split: str = "search") -> list[Individual]:
        """Finished individuals of a search, in the order in which they finished; on the search split as `told` says."""
        candidates = {one.number: one for one in self.candidates(search)}
        outcomes = self.told(search) if split == "search" else self.outcomes(search, split)
        with self._readable():
            return [Individual(candidates[number], outcome) for number, outcome in outcomes.items()]

    def _fetch(self, query: str, arguments: tuple[object, ...]) -> list[Any]:
        with _explained(self.path):
            return self._database.execute(query, arguments).fetchall()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            raise JournalError(f"{self.path}: has no candidate {error} that it tells of; {_RESTORE}") from error
        except (GenomeError, ValueError, SafetensorError, zlib.error) as error:
            raise JournalError(f"{self.path}: holds what cannot be read ({line_of(error)}); {_RESTORE}") from error

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with _explained(self.path), _transaction(self._database):
            yield self._database


_RESTORE = "restore the file from a copy, or start anew in another folder"


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.rollback()
        raise
    database.commit()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an error of SQLite into a JournalError that says what the user can do."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # a candidate or an outcome written twice is a defect of ours, not of the file
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            advice = "another program holds it open; close that and run the same command again"
        elif "full" in str(error) or "disk I/O" in str(error):
            advice = "free space on that disk and run the same command again: all that was finished is kept"
        else:
            advice = "check that the folder exists and can be written"
        raise JournalError(f"{path}: {error}; {advice}") from error
    except sqlite3.DatabaseError as error:
        raise JournalError(f"{path}: not a readable journal ({error}); {_RESTORE}") from error
