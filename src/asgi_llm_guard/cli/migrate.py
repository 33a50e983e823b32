"""`migrate`: one storage into another, with a checksum of totals."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from asgi_llm_guard.cli.common import Tool, command_options, progress, run
from asgi_llm_guard.cli.tables import Column, count, table, usd

if TYPE_CHECKING:
    from asgi_llm_guard.storage.migrate import Migrated

__all__ = ["migrate"]


@click.command()
@command_options
@click.option("--from", "source", metavar="URL", help="The storage to copy; default: as the settings say.")
@click.option("--to", "target", required=True, envvar="ASGI_LLM_GUARD_TARGET", metavar="URL", help="An empty storage.")
def migrate(tool: Tool, source: str | None, target: str) -> None:
    """Copy everything that a storage keeps into an empty one, and compare.

    Counters, open holds, owners, ids and usage records; between SQLite, Redis and Valkey in any form. Stop the service
    first: that the source stood still is checked. The target is compared line by line; where anything differs, the
    command fails and says what.

    A URL with a password belongs in the environment and not on the command line, which others on this host can read:
    the source's in LLM_GUARD_STORAGE, the target's in ASGI_LLM_GUARD_TARGET.

    Exit codes: 0 copied and found alike; 3 a URL is wrong; 4 a storage is away, or they are not alike.
    """
    from asgi_llm_guard.storage.migrate import open_and_copy

    if source is None:
        source = tool.settings().storage.get_secret_value()
    with progress("lines") as bar:
        copied = run(open_and_copy(source, target, progress=_staged(bar)))
    tool.show({"copied": copied}, lambda: _text(copied))


def _staged(bar: Callable[[int], None]) -> Callable[[str, int], None]:
    return lambda _stage, lines: bar(lines)


def _text(copied: Migrated) -> str:
    rows = [
        (name.replace("_", " "), usd(value) if name == "cost_nanousd" else count(value))
        for name, value in ((name, getattr(copied, name)) for name in copied.__struct_fields__ if name != "digest")
    ]
    columns = [Column("COPIED", keep=True), Column("", align="right")]
    return f"{table(columns, rows)}\n\nBoth sides are alike: sha256 {copied.digest}"
