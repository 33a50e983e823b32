-- The tables of entries (entries.py) in a SQLite storage. They are made when a cache first asks for them, so a file
-- without one is as it was. The number in their names counts up with every change here: entries are not worth a
-- migration, and a release that looks for other tables begins anew.
--
--   entries1        one row per key of a space: a claim, or with `size` a value; row numbers follow the order in which
--                   values were stored
--   entry_sums1     one row per space: how many values there are, and their bytes
--   entry_epochs1   one row per name of a space
--
-- `epochs` is a JSON object from the names of an entry to their epochs when it was begun.

CREATE TABLE IF NOT EXISTS entries1 (
    row INTEGER PRIMARY KEY,
    space TEXT NOT NULL,
    key TEXT NOT NULL,
    token TEXT NOT NULL,
    until_ms INTEGER NOT NULL,
    epochs TEXT NOT NULL,
    note TEXT NOT NULL,
    at_ms INTEGER,
    size INTEGER,
    value BLOB,
    UNIQUE (space, key)
);

CREATE INDEX IF NOT EXISTS entries1_by_age ON entries1 (space, row) WHERE size IS NOT NULL;

CREATE INDEX IF NOT EXISTS entries1_by_end ON entries1 (until_ms);

CREATE TABLE IF NOT EXISTS entry_sums1 (
    space TEXT NOT NULL PRIMARY KEY,
    entries INTEGER NOT NULL,
    bytes INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS entry_epochs1 (
    space TEXT NOT NULL,
    name TEXT NOT NULL,
    epoch TEXT NOT NULL,
    until_ms INTEGER NOT NULL,
    PRIMARY KEY (space, name)
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS entry_epochs1_by_end ON entry_epochs1 (until_ms)
