-- The tables of a SQLite storage. PRAGMA user_version holds the schema's version, PRAGMA
-- application_id says that the file is ours.
--
--   cells        one row per meter: its counters and the window instance they belong to
--   crowds       one row per `Distinct` meter: how many ids are live
--   members      one row per live id of a `Distinct` meter
--   holds        one row per open call: all its receipts in one value, with the draft record
--   tombstones   one row per call id that has ended without a row in the ledger, or that expired;
--                for ten minutes
--   owners       one row per process: until when its last heartbeat keeps its holds
--   turns        one row per recent transaction: which rows it changed that other processes may remember
--   templates    what meters have in common: policy, limit, window; as many as were ever configured
--   ledger       one row per finished call: what reports read; made by usage_rows.py, with
--                ledger_replaced: what rows of it were before they were replaced
--
-- All but the last three is bounded by what is alive: rows whose time is over are removed a few at
-- a time. `data` is MessagePack (sqlite_codec.py). Instants are milliseconds since the Unix epoch.

CREATE TABLE cells (
    key TEXT NOT NULL PRIMARY KEY,
    kind INTEGER NOT NULL,
    used INTEGER NOT NULL,
    held INTEGER NOT NULL,
    starts INTEGER NOT NULL,
    ends_ms INTEGER NOT NULL,
    parts BLOB
) WITHOUT ROWID;

CREATE TABLE crowds (
    key TEXT NOT NULL PRIMARY KEY,
    live INTEGER NOT NULL,
    first_ms INTEGER NOT NULL,
    last_ms INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE members (
    key TEXT NOT NULL,
    member TEXT NOT NULL,
    until_ms INTEGER NOT NULL,
    PRIMARY KEY (key, member)
) WITHOUT ROWID;

CREATE INDEX members_by_end ON members (key, until_ms);

CREATE TABLE holds (
    call_id TEXT NOT NULL PRIMARY KEY,
    owner TEXT NOT NULL,
    data BLOB NOT NULL
);

CREATE TABLE tombstones (
    row INTEGER PRIMARY KEY,
    call_id TEXT NOT NULL UNIQUE,
    reason TEXT NOT NULL,
    until_ms INTEGER NOT NULL,
    data BLOB
);

CREATE TABLE owners (
    owner TEXT NOT NULL PRIMARY KEY,
    lapse_at_ms INTEGER NOT NULL,
    lapsed_ms INTEGER NOT NULL
) WITHOUT ROWID;

-- `changed` is MessagePack: keys of cells, then call ids of holds. NULL: whatever is remembered is in doubt.
CREATE TABLE turns (
    turn INTEGER PRIMARY KEY,
    changed BLOB
);

CREATE TABLE templates (
    id INTEGER PRIMARY KEY,
    data BLOB NOT NULL UNIQUE
);
