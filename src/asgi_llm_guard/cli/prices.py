"""`prices`: what a newer price list would change, and taking it."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from asgi_llm_guard.cli.common import Tool, command_options, confirm
from asgi_llm_guard.cli.failures import Exit, Failure
from asgi_llm_guard.cli.root import Late
from asgi_llm_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_llm_guard.pricing.diff import Diff

__all__ = ["diff", "prices", "update"]


@click.group(cls=Late)
def prices() -> None:
    """The price list: what would change, and take it.

    Prices ship with each release and are never fetched while a service runs. A newer list comes as a file, or, when it
    is asked for, from the newest release of this package.
    """


prices.listing = MappingProxyType(
    {
        "diff": ("prices:diff", "What is different in another price list."),
        "update": ("prices:update", "Write what has changed as overrides of the settings."),
    }
)

_source = click.argument("source", metavar="FILE|release", required=True)


@click.command()
@command_options
@_source
@click.option(
    "--against", type=click.Path(exists=True, dir_okay=False), help="Compare with this list, not the shipped one."
)
def diff(tool: Tool, source: str, against: str | None) -> None:
    """What is different in another price list: models, and of those that both have, rates and limits.

    FILE is a list as `prices.json` of this package. `release` fetches that of the newest release from the package index
    (with pip or uv; nothing of it is run). Rates are in $ for a million tokens. A rate that changes by more than ten
    times is marked: that is a mistake more often than news.

    Exit codes: 0 nothing is different; 1 something is.
    """
    from asgi_llm_guard.pricing.diff import compare

    new, old = _list(source), _shipped() if against is None else _read(Path(against))
    found = compare(old, new)
    document = _document(found, old, new)
    tool.show(document, lambda: f"{old['date']} -> {new['date']}\n{found}")
    if found:
        raise click.exceptions.Exit(Exit.FOUND)


@click.command()
@command_options
@_source
@click.option(
    "--output", "-o", required=True, type=click.Path(dir_okay=False), help="The overrides file to write (TOML)."
)
@click.option("--accept", is_flag=True, help="Write suspicious changes, too.")
@click.option("--yes", is_flag=True, help="Do not ask before a file is replaced.")
def update(tool: Tool, source: str, output: str, *, accept: bool, yes: bool) -> None:
    """Write what has changed as overrides, for `overrides` in [prices] of the settings.

    What is only in the newer list, and what is priced otherwise there, is written with all of its rates for text. Long
    contexts, dates and tiers of service come with the next release. Rates that changed by more than ten times stop it:
    look at them, then run it with --accept.

    Exit codes: 0 written, or nothing to write; 1 something is suspicious, and nothing was written.
    """
    from asgi_llm_guard.pricing.diff import compare
    from asgi_llm_guard.pricing.diff import overrides as changed

    old, new = _shipped(), _list(source)
    found = compare(old, new)
    if found.suspicious and not accept:
        lines = "\n".join(found.suspicious)
        raise Failure(f"{lines}\nsuspicious: nothing was written; look at it, then run with --accept", Exit.FOUND)
    content, skipped = changed(old, new)
    target = Path(output)
    if content and target.exists():
        confirm(f"Replace {target}?", yes=yes)
    if content:
        target.write_text(f"# Prices of {new['date']} that differ from those of {old['date']}.\n\n{content}", "utf-8")
    document = _document(found, old, new) | {"file": output if content else None, "not_written": skipped}
    told = f"Written to {target}; name it as `overrides` in [prices]." if content else "There is nothing to write."
    rest = "".join(f"\nnot written, because only rates for text can be: {name}" for name in skipped)
    tool.show(document, lambda: f"{found}\n\n{told}{rest}")


def _document(found: Diff, old: Any, new: Any) -> dict[str, Any]:
    return {
        "from": old["date"],
        "to": new["date"],
        "added": found.added,
        "removed": found.removed,
        "changed": found.changed,
        "suspicious": found.suspicious,
    }


# --------------------------------------------------------------------------------------- sources


def _list(source: str) -> Any:
    return _newest() if source == "release" else _read(Path(source))


def _shipped() -> Any:
    from importlib import resources

    return json.loads((resources.files("asgi_llm_guard") / "data" / "prices.json").read_bytes())


def _read(file: Path) -> Any:
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ConfigurationError(
            f"{file}: is not JSON; expected a price list such as this package's prices.json"
        ) from None
    if not isinstance(found, dict) or not {"providers", "date", "schema"} <= found.keys():
        raise ConfigurationError(f"{file}: is no price list; expected providers, date and schema")
    if found["schema"] != _shipped()["schema"]:
        raise ConfigurationError(f"{file}: has schema {found['schema']}, and this release reads {_shipped()['schema']}")
    return found


def _newest() -> Any:
    """The price list of the newest release: installed as a wheel into a folder of its own, and read, not run."""
    import os
    import shutil
    import subprocess
    import sys
    import tempfile

    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    pip = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip, "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", folder]
        ran = subprocess.run([*command, "asgi-llm-guard"], capture_output=True, text=True, check=False)  # noqa: S603
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or ["no reason was given"])[-1]
            raise Failure(f"the newest release cannot be fetched: {last}", Exit.AWAY)
        return _read(Path(folder) / "asgi_llm_guard" / "data" / "prices.json")
