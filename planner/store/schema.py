"""The tables, and how an older file becomes a newer one."""

from __future__ import annotations

APPLICATION_ID = 0x71706C6E
"""``qpln`` in SQLite's header: tells qplan's file from another program's."""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE measurement (
        id INTEGER PRIMARY KEY,
        measured_at TEXT NOT NULL,
        hardware_identity TEXT NOT NULL,
        hardware_name TEXT NOT NULL,
        model TEXT NOT NULL,
        model_sha256 TEXT NOT NULL,
        method TEXT NOT NULL,
        runtime TEXT NOT NULL,
        type TEXT NOT NULL,
        group_size INTEGER,
        imatrix INTEGER NOT NULL,
        quantity TEXT NOT NULL,
        value REAL NOT NULL,
        low REAL NOT NULL,
        high REAL NOT NULL,
        samples TEXT NOT NULL,
        conditions TEXT NOT NULL,
        predicted REAL,
        weights_bytes REAL,
        tool_version TEXT NOT NULL
    );
    CREATE INDEX measurement_by_machine ON measurement (hardware_identity, quantity, id);
    """,
    """
    CREATE TABLE rate (
        hardware_identity TEXT NOT NULL,
        work TEXT NOT NULL,
        device TEXT NOT NULL,
        type TEXT NOT NULL,
        threads INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        depth INTEGER NOT NULL,
        model TEXT NOT NULL,
        model_sha256 TEXT NOT NULL,
        value REAL NOT NULL,
        low REAL NOT NULL,
        high REAL NOT NULL,
        hardware_name TEXT NOT NULL,
        tool_version TEXT NOT NULL,
        measured_at TEXT NOT NULL,
        PRIMARY KEY (hardware_identity, work, device, type, threads, tokens, model_sha256)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE tuned (
        hardware_identity TEXT NOT NULL,
        model_sha256 TEXT NOT NULL,
        type TEXT NOT NULL,
        on_gpu INTEGER NOT NULL,
        measured_at TEXT NOT NULL,
        document TEXT NOT NULL,
        PRIMARY KEY (hardware_identity, model_sha256, type, on_gpu)
    ) WITHOUT ROWID;
    CREATE TABLE submission (
        sha256 TEXT PRIMARY KEY,
        source TEXT NOT NULL,
        imported_at TEXT NOT NULL,
        document TEXT NOT NULL
    ) WITHOUT ROWID;
    """,
)
"""One script a version, each run once and in order; ``PRAGMA user_version`` counts those that ran."""

VERSION = len(MIGRATIONS)
