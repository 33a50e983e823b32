-- The tables of what processes share (shared.py) in a SQLite storage. They are made when something is first shared, so
-- a file without it is as it was. The number in their names counts up with every change here.
--
--   shared_documents1   one row per document: the highest version that was published
--   shared_tallies1     one row per hour and key of a tally, for 90 days
--   shared_marks1       one row per mark that is not over; what is over goes with those that come

CREATE TABLE IF NOT EXISTS shared_documents1 (
    name TEXT NOT NULL PRIMARY KEY,
    version INTEGER NOT NULL,
    data BLOB NOT NULL
);

CREATE TABLE IF NOT EXISTS shared_tallies1 (
    name TEXT NOT NULL,
    hour_ms INTEGER NOT NULL,
    key TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (name, hour_ms, key)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS shared_marks1 (
    name TEXT NOT NULL PRIMARY KEY,
    until_ms INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS shared_marks1_by_end ON shared_marks1 (until_ms)
