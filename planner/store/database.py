"""The SQLite file of measurements: write-ahead log, so that several qplan processes may write at once."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from planner.core.candidate import Placement
from planner.core.codec import decode, encode
from planner.core.errors import InputError, QplanError
from planner.core.measurement import Calibration, Conditions, Measurement
from planner.core.rates import Rate, Rates
from planner.core.submission import Imported, Submission
from planner.core.tuned import Tuned
from planner.store import default_path
from planner.store.schema import APPLICATION_ID, MIGRATIONS, VERSION

_BUSY_SECONDS = 10.0
"""A writer holds the file for milliseconds; this is for a slow disk."""
_CALIBRATION_COUNT = 1000
"""Rows that start-up reads: 15 ms. Six a verification, so the last 160 verifications."""
_COLUMNS = tuple(field.name for field in fields(Measurement))
_RATE_COLUMNS = tuple(field.name for field in fields(Rate))
_RATES_SINCE = 2
"""Version of the file that has rates."""
_TUNED_SINCE = 3
"""Version of the file that has tuned settings and submissions."""
_FILTERS = ("hardware_identity", "quantity", "model", "model_sha256", "method", "runtime", "type")


class Store:
    """Measurements on disk.

    Args:
        path: the file; ``None`` is the one under ``QPLAN_HOME``. It is created, with its folder, unless ``read_only``.
        read_only: never write, not even a log beside the file where the folder cannot be written.

    Raises:
        InputError: the file cannot be opened, is damaged, of a newer qplan, or another program's. It is left alone.
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        self.path = path or default_path()
        with self._explained():
            self._connection = self._connect(read_only=read_only)
            try:
                self._require_ours(read_only=read_only)
                if not read_only:
                    self._migrate()
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._connection.close()

    def add(self, measurements: Iterable[Measurement]) -> int:
        """Keep ``measurements``, all or none; returns how many.

        Raises:
            InputError: the file cannot be written.
        """
        rows = [_row(measurement) for measurement in measurements]
        names, marks = ", ".join(_COLUMNS), ", ".join("?" * len(_COLUMNS))
        with self._explained(), self._transaction():
            self._connection.executemany(f"INSERT INTO measurement ({names}) VALUES ({marks})", rows)
        return len(rows)

    def list(self, *, limit: int | None = None, **filters: str) -> tuple[Measurement, ...]:
        """Measurements that equal every given filter, in the order they were added.

        Args:
            limit: only the newest so many.
            filters: ``hardware_identity``, ``quantity``, ``model``, ``model_sha256``, ``method``, ``runtime``,
                ``type``.
        """
        unknown = [name for name in filters if name not in _FILTERS]
        if unknown:
            raise TypeError(f"no filter {', '.join(unknown)}; there are {', '.join(_FILTERS)}")
        if self._blank:
            return ()
        where = " AND ".join(f"{name} = ?" for name in filters) or "1"
        query = f"SELECT {', '.join(_COLUMNS)} FROM measurement WHERE {where} ORDER BY id DESC LIMIT ?"
        with self._explained():
            rows = self._connection.execute(query, (*filters.values(), -1 if limit is None else limit)).fetchall()
            return tuple(_measurement(row) for row in reversed(rows))

    def calibration(self, hardware_identity: str) -> Calibration:
        """What was measured on one machine, the newest thousand, newest last."""
        newest = self.list(hardware_identity=hardware_identity, limit=_CALIBRATION_COUNT)
        rates = Rates(self.rates(hardware_identity))
        tuned = self.tuned(hardware_identity)
        return Calibration(hardware_identity=hardware_identity, measurements=newest, rates=rates, tuned=tuned)

    def rates(self, hardware_identity: str | None = None) -> tuple[Rate, ...]:
        """What was calibrated on one machine, or on all; nothing where the file is of a qplan that did not."""
        with self._explained():
            if not self._knows(_RATES_SINCE):
                return ()
            where, values = ("1", ()) if hardware_identity is None else ("hardware_identity = ?", (hardware_identity,))
            query = f"SELECT {', '.join(_RATE_COLUMNS)} FROM rate WHERE {where}"
            return tuple(_rate(row) for row in self._connection.execute(query, values).fetchall())

    def add_rates(self, rates: Iterable[Rate]) -> int:
        """Keep ``rates``, all or none, in the place of those of the same case; returns how many.

        Raises:
            InputError: the file cannot be written.
        """
        rows = [tuple(getattr(rate, name) for name in _RATE_COLUMNS) for rate in rates]
        names, marks = ", ".join(_RATE_COLUMNS), ", ".join("?" * len(_RATE_COLUMNS))
        with self._explained(), self._transaction():
            self._connection.executemany(f"INSERT OR REPLACE INTO rate ({names}) VALUES ({marks})", rows)
        return len(rows)

    def forget_rates(self, hardware_identity: str) -> int:
        """Drop what was calibrated on one machine; returns how many rates that were."""
        with self._explained(), self._transaction():
            return self._connection.execute(
                "DELETE FROM rate WHERE hardware_identity = ?", (hardware_identity,)
            ).rowcount

    def tuned(self, hardware_identity: str) -> tuple[Tuned, ...]:
        """What was tuned on one machine, newest last; nothing where the file is of a qplan that did not."""
        with self._explained():
            if not self._knows(_TUNED_SINCE):
                return ()
            query = "SELECT document FROM tuned WHERE hardware_identity = ? ORDER BY measured_at, model_sha256, type"
            return tuple(_tuned(text) for (text,) in self._connection.execute(query, (hardware_identity,)))

    def add_tuned(self, found: Tuned) -> None:
        """Keep the settings in the place of those of the same model, type and device.

        Raises:
            InputError: the file cannot be written.
        """
        key = (found.hardware_identity, found.model_sha256, found.type, int(found.on_gpu))
        with self._explained(), self._transaction():
            self._connection.execute(
                "INSERT OR REPLACE INTO tuned VALUES (?, ?, ?, ?, ?, ?)",
                (*key, found.measured_at, json.dumps(encode(found), sort_keys=True)),
            )

    def forget_tuned(self, hardware_identity: str, model_sha256: str) -> int:
        """Drop what was tuned for a model on one machine; returns how many settings that were."""
        with self._explained(), self._transaction():
            query = "DELETE FROM tuned WHERE hardware_identity = ? AND model_sha256 = ?"
            return self._connection.execute(query, (hardware_identity, model_sha256)).rowcount

    def submissions(self) -> tuple[Imported, ...]:
        """What other people measured and was imported, in the order it was; never part of :meth:`calibration`."""
        with self._explained():
            if not self._knows(_TUNED_SINCE):
                return ()
            query = "SELECT sha256, source, imported_at, document FROM submission ORDER BY imported_at, sha256"
            rows = self._connection.execute(query).fetchall()
            return tuple(
                Imported(sha256=sha256, source=source, imported_at=at, submission=_submission(text))
                for sha256, source, at, text in rows
            )

    def add_submission(self, found: Imported) -> bool:
        """Keep a submission; False where the very same is there already.

        Raises:
            InputError: the file cannot be written.
        """
        document = json.dumps(encode(found.submission), sort_keys=True)
        with self._explained(), self._transaction():
            added = self._connection.execute(
                "INSERT OR IGNORE INTO submission VALUES (?, ?, ?, ?)",
                (found.sha256, found.source, found.imported_at, document),
            )
            return added.rowcount > 0

    def _knows(self, version: int) -> bool:
        return not self._blank and self._pragma("user_version") >= version

    def _connect(self, *, read_only: bool) -> sqlite3.Connection:
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        address = self.path.resolve().as_uri()
        connection = sqlite3.connect(f"{address}?mode=ro", uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError:
            # A file with a write-ahead log in a folder that cannot be written: its log's index cannot be made.
            connection.close()
            return sqlite3.connect(f"{address}?immutable=1", uri=True, isolation_level=None)
        return connection

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    def _require_ours(self, *, read_only: bool) -> None:
        version, owner = self._pragma("user_version"), self._pragma("application_id")
        is_empty = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        self._blank = read_only and is_empty  # another process is just making it
        if owner != APPLICATION_ID and not (is_empty and owner == 0):
            raise InputError(
                f"{self.path} is not qplan's store of measurements",
                hint="another program made it; move it away, or set QPLAN_HOME to another folder",
                code="store-foreign",
            )
        if version > VERSION:
            raise InputError(
                f"{self.path} was written by a newer qplan",
                numbers=f"its version is {version}, this qplan knows {VERSION}",
                hint="upgrade qplan, or set QPLAN_HOME to another folder",
                code="store-newer",
            )

    def _migrate(self) -> None:
        if self._pragma("user_version") == VERSION:
            return
        with suppress(sqlite3.OperationalError):  # another process is switching it, or the file system has no mmap
            self._connection.execute("PRAGMA journal_mode = WAL")
        with self._transaction():  # another process may have migrated while we waited, so look again
            for version in range(self._pragma("user_version"), VERSION):
                for statement in MIGRATIONS[version].split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {version + 1}")
            self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise _explanation(self.path, error) from None


def _explanation(path: Path, error: sqlite3.Error | OSError) -> QplanError:
    text = str(error)
    if isinstance(error, sqlite3.OperationalError) and "locked" in text:
        return InputError(
            f"{path} is in use by another program",
            numbers=f"waited {_BUSY_SECONDS:.0f} s",
            hint="try again when the other qplan is done",
            code="store-busy",
        )
    if isinstance(error, OSError) or any(word in text for word in ("readonly", "unable to open", "full", "disk I/O")):
        return InputError(
            f"{path} cannot be opened or written",
            numbers=text,
            hint="make its folder writable, or set QPLAN_HOME to another folder",
            code="store-unwritable",
        )
    return InputError(
        f"{path} is damaged",
        numbers=text,
        hint="move it away and qplan starts a new one; it is not touched until then",
        code="store-damaged",
    )


def _tuned(text: str) -> Tuned:
    """Without pydantic, which every start-up would pay for."""
    try:
        values = json.loads(text)
        place = {**values.pop("placement")}
        place["tensor_split"] = tuple(place["tensor_split"])
        return Tuned(**values, placement=Placement(**place))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise sqlite3.DatabaseError(f"a row cannot be read: {error}") from None


def _submission(text: str) -> Submission:
    try:
        return decode(Submission, json.loads(text), what="a row")
    except (ValueError, QplanError) as error:
        raise sqlite3.DatabaseError(f"a row cannot be read: {error}") from None


def _rate(row: tuple[Any, ...]) -> Rate:
    values = dict(zip(_RATE_COLUMNS, row, strict=True))
    try:
        for name in ("value", "low", "high"):
            values[name] = float(values[name])
    except (ValueError, TypeError) as error:
        raise sqlite3.DatabaseError(f"a row cannot be read: {error}") from None
    return Rate(**values)


def _row(measurement: Measurement) -> tuple[Any, ...]:
    values = {name: getattr(measurement, name) for name in _COLUMNS}
    values["samples"] = json.dumps(list(measurement.samples))
    values["conditions"] = json.dumps(encode(measurement.conditions), sort_keys=True)
    return tuple(values[name] for name in _COLUMNS)


def _measurement(row: tuple[Any, ...]) -> Measurement:
    values = dict(zip(_COLUMNS, row, strict=True))
    try:
        values["samples"] = tuple(float(sample) for sample in json.loads(values["samples"]))
        values["conditions"] = Conditions(**json.loads(values["conditions"]))
    except (ValueError, TypeError) as error:
        raise sqlite3.DatabaseError(f"a row cannot be read: {error}") from None
    values["imatrix"] = bool(values["imatrix"])
    return Measurement(**values)
