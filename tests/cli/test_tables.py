"""Tables and periods for people."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from tests.cli.kit import fill, process, settings

from asgi_llm_guard.cli.periods import instant_of
from asgi_llm_guard.cli.tables import Column, instant, safe, table, usd, width_of
from asgi_llm_guard.errors import ConfigurationError

NOW = int(datetime(2026, 11, 21, 18, 30, tzinfo=UTC).timestamp() * 1000)
COLUMNS = [Column("WHO"), Column("CALLS", align="right"), Column("WHEN", keep=True)]


def test_columns_line_up() -> None:
    """Texts stand left, numbers right in groups of three, and what is missing is a dash."""
    assert table(COLUMNS, [("mia", 1_234_567, "now"), (None, 7, "then")]).splitlines() == [
        "WHO      CALLS  WHEN",
        "───  ─────────  ────",
        "mia  1,234,567  now",
        "-            7  then",
    ]


def test_wide_texts_are_cut_first() -> None:
    """A table fits the width that it is given: the widest texts lose their ends, numbers and kept columns nothing."""
    text = table(COLUMNS, [("x" * 100, 12_345, "2026-11-21"), ("y", 1, "2026-11-22")], width=40)
    assert max(map(width_of, text.splitlines())) == 40
    assert "…" in text
    assert "12,345" in text
    assert "2026-11-21" in text


def test_wide_characters_take_two_columns() -> None:
    """Cells of East Asian characters line up, and are cut between characters."""
    lines = table(
        [Column("WHO"), Column("N", align="right")], [("部門部門部門部門", 1), ("abc", 22)], width=12
    ).splitlines()
    assert {width_of(line) for line in lines} == {12}


def test_cells_cannot_move_the_cursor() -> None:
    """T16: control characters of ids are shown as escapes."""
    assert safe("a\x1b[2Jb\r\nc\u202e") == "a\\x1b[2Jb\\r\\nc\\u202e"
    assert "\x1b" not in table(COLUMNS, [("\x1b[31m", 1, "x")])


@pytest.mark.parametrize(
    ("nanousd", "shown"),
    [
        (None, "-"),
        (0, "$0.00"),
        (1, "<$0.000001"),
        (1_500, "$0.000002"),
        (9_999_999, "$0.01"),
        (10_000_000, "$0.01"),
        (1_234_567_890_000, "$1,234.57"),
        (-2_500_000_000, "-$2.50"),
    ],
)
def test_money_is_shown_with_what_tells_something(nanousd: int | None, shown: str) -> None:
    """Cents, or for less than one as many digits as matter; unknown is not zero."""
    assert usd(nanousd) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("24h", "2026-11-20 18:30:00"),
        ("now", "2026-11-21 18:30:00"),
        ("today", "2026-11-21 00:00:00"),
        ("yesterday", "2026-11-20 00:00:00"),
        ("month", "2026-11-01 00:00:00"),
        ("2026-10", "2026-10-01 00:00:00"),
        ("2026-10-05", "2026-10-05 00:00:00"),
        ("2026-10-05T08:00Z", "2026-10-05 08:00:00"),
        ("2026-10-05T08:00+02:00", "2026-10-05 06:00:00"),
    ],
)
def test_periods_are_read_as_people_write_them(text: str, shown: str) -> None:
    """Times ago, named days, months, days and instants."""
    assert instant(instant_of(text, now_ms=NOW)) == shown


def test_days_begin_in_their_zone() -> None:
    """A day of Berlin begins an hour before that of UTC in winter, two in summer."""
    assert instant(instant_of("2026-11-21", now_ms=NOW, tz="Europe/Berlin")) == "2026-11-20 23:00:00"
    assert instant(instant_of("2026-07-01", now_ms=NOW, tz="Europe/Berlin")) == "2026-06-30 22:00:00"


@pytest.mark.parametrize("text", ["soon", "2026-13", "2026-11-31", "5 minutes", "", "-1d"])
def test_other_texts_are_no_periods(text: str) -> None:
    """What is no period is refused with those that are."""
    with pytest.raises(ConfigurationError, match="expected a time ago"):
        instant_of(text, now_ms=NOW)


def test_tables_fit_the_terminal_and_pipes_have_no_width(tmp_path: Path) -> None:
    """With COLUMNS, lines are cut to it; in a pipe without it, nothing is."""
    settings(tmp_path, "")
    fill(tmp_path, calls=6)
    narrow = process("sessions", cwd=tmp_path, env={"COLUMNS": "90"}).stdout
    assert max(map(width_of, narrow.splitlines())) <= 90
    assert "…" in narrow
    assert "…" not in process("sessions", cwd=tmp_path).stdout
