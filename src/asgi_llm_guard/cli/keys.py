"""`keys`: API keys, in administration data or in a keys file."""

from __future__ import annotations

import getpass
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import click

from asgi_llm_guard.cli.changing import actor, administered
from asgi_llm_guard.cli.common import Tool, command_options, confirm, control_option, reason_option, run
from asgi_llm_guard.cli.failures import Exit, Failure
from asgi_llm_guard.cli.periods import check_length, end_of
from asgi_llm_guard.cli.root import Late
from asgi_llm_guard.cli.tables import Column, instant, table
from asgi_llm_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_llm_guard.control.values import Key
    from asgi_llm_guard.identity.keys import ApiKey

__all__ = ["hash_", "keys", "list_", "new", "revoke", "rotate"]


@click.group(cls=Late)
def keys() -> None:
    """API keys: new, list, rotate, revoke, hash.

    With administration data (`control` in the settings, or --control) keys are kept there, and every process follows
    within two seconds. Without, `new` and `hash` give the entry of a keys file. A key is shown once and kept nowhere;
    the secret that digests are made with is read from the settings and the environment, never from the command line.
    """


keys.listing = MappingProxyType(
    {
        "new": ("keys:new", "Make a key, and show it once."),
        "list": ("keys:list_", "The keys that there are: whose, until when."),
        "rotate": ("keys:rotate", "Make a new key in place of one, which still holds for a while."),
        "revoke": ("keys:revoke", "End a key now."),
        "hash": ("keys:hash_", "The entry for a key that you have, read from stdin."),
    }
)

_MOST_LINE: Final = 4_096


def _whose(function: Callable[..., Any]) -> Callable[..., Any]:
    """Who a key stands for; the command is given them in one mapping, `whose`."""
    import functools

    @click.option("--caller", required=True, help="The verified caller that it stands for.")
    @click.option("--user", help="The person behind the caller, where the two differ.")
    @click.option("--department", "departments", multiple=True, help="May be given several times.")
    @click.option("--agent")
    @click.option("--tag", "tags", multiple=True, help="May be given several times.")
    @click.option("--max-iterations", type=click.IntRange(0), help="The key's own limit of calls for each session.")
    @click.option("--expires", metavar="WHEN", help="90d, 2027-06-30, …; default: it does not end.")
    @functools.wraps(function)
    def with_whose(
        *arguments: Any,
        caller: str,
        user: str | None,
        departments: tuple[str, ...],
        agent: str | None,
        tags: tuple[str, ...],
        max_iterations: int | None,
        expires: str | None,
        **others: Any,
    ) -> Any:
        whose = {
            "caller": caller,
            "user": user,
            "departments": departments,
            "agent": agent,
            "tags": tags,
            "params": {} if max_iterations is None else {"max_iterations": max_iterations},
            "expires_at_ms": None if expires is None else end_of(expires, name="--expires"),
        }
        return function(*arguments, whose=whose, **others)

    return with_whose


@click.command()
@command_options
@control_option
@_whose
@click.option("--reason", default="", help="Why; kept in the audit.")
def new(tool: Tool, whose: dict[str, Any], reason: str) -> None:
    """Make a key, and show it once.

    Without administration data it prints the entry to be added to the keys file.
    """
    control = administered(tool, needed=False, makes=True)
    if control is None:
        key, record = _generate(tool, whose)
        _show_entry(tool, key, record)
        return
    shown, kept = run(control.do(lambda it: it.new_key(actor=actor(), reason=reason, **whose)))
    _show_new(tool, shown, kept)


@click.command("list")
@command_options
@control_option
@click.option("--all", "everything", is_flag=True, help="Those that have ended, too.")
def list_(tool: Tool, *, everything: bool) -> None:
    """The keys that there are: whose, until when. Never a key itself."""
    control = administered(tool, needed=False)
    now_ms = time.time_ns() // 1_000_000
    known = _of_file(tool) if control is None else run(control.do(_of_control))
    rows = [row for row in known if everything or not _over(row, now_ms)]
    columns = [
        Column("ID", keep=True),
        Column("CALLER"),
        Column("USER"),
        Column("DEPARTMENTS"),
        Column("AGENT"),
        Column("ENDS (UTC)", keep=True),
        Column("STATE", keep=True),
    ]
    lines = [
        (
            row["id"],
            row["caller"],
            row["user"],
            ", ".join(row["departments"]) or None,
            row["agent"],
            instant(row["expires_at_ms"])[:16],
            "ended" if _over(row, now_ms) else "holds",
        )
        for row in rows
    ]
    tool.show({"keys": rows}, lambda: table(columns, lines) if lines else "There are no keys.")


@click.command()
@command_options
@control_option
@click.argument("id_", metavar="ID")
@click.option(
    "--overlap", default="7d", show_default=True, callback=check_length, help="How long the old key still holds."
)
@reason_option
def rotate(tool: Tool, id_: str, overlap: str, reason: str) -> None:
    """Make a new key in place of one, which still holds for a while: both are known until then."""
    control = administered(tool)
    shown, kept = run(control.do(lambda it: it.rotate_key(id_, overlap=overlap, actor=actor(), reason=reason)))
    _show_new(tool, shown, kept)


@click.command()
@command_options
@control_option
@click.argument("id_", metavar="ID")
@reason_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def revoke(tool: Tool, id_: str, reason: str, *, yes: bool) -> None:
    """End a key now. Every process refuses it within two seconds."""
    control = administered(tool)
    confirm(f"End the key {id_} now? Whoever uses it is refused.", yes=yes)
    run(control.do(lambda it: it.revoke_key(id_, actor=actor(), reason=reason)))
    tool.show({"revoked": id_}, lambda: f"The key {id_} has ended.")


@click.command("hash")
@command_options
@_whose
@click.option("--id", "id_", required=True, help="What the key is called in the file.")
def hash_(tool: Tool, whose: dict[str, Any], id_: str) -> None:
    """The entry of a keys file for a key that you have already. The key is read from stdin, and not shown.

    `printf %s "$KEY" | asgi-llm-guard keys hash --id old-key --caller team-research`
    """
    from asgi_llm_guard.identity.keys import ApiKey, ApiKeys

    key = getpass.getpass("Key: ") if sys.stdin.isatty() else sys.stdin.readline(_MOST_LINE)
    record = ApiKey(id=id_, digest=ApiKeys.hash(key.strip(), _secret(tool)), **_record_fields(whose))
    document = {"id": record.id, "digest": record.digest, "entry": record.to_toml()}
    tool.show(document, lambda: record.to_toml().rstrip())


# ------------------------------------------------------------------------------------ keys files


def _generate(tool: Tool, whose: Mapping[str, Any]) -> tuple[str, ApiKey]:
    from asgi_llm_guard.identity.keys import ApiKeys

    fields = _record_fields(whose)
    return ApiKeys.generate(fields.pop("caller"), secret=_secret(tool), **fields)


def _record_fields(whose: Mapping[str, Any]) -> dict[str, Any]:
    from datetime import UTC, datetime

    fields = dict(whose)
    ends_ms = fields.pop("expires_at_ms")
    return fields | {"expires_at": None if ends_ms is None else datetime.fromtimestamp(ends_ms / 1000, UTC)}


def _keys_file(tool: Tool) -> tuple[Any, Path | None]:
    settings = tool.settings()
    identity = settings.identity
    if identity is None or identity.kind != "api_keys":
        raise Failure(
            f'{tool.path}: there are no keys here: neither `control`, nor [identity] with kind = "api_keys"',
            Exit.CONFIGURATION,
        )
    file = getattr(identity, "file", None)
    return identity, None if file is None else settings.directory / file


def _secret(tool: Tool) -> str:
    """The secret that digests are made with: the settings', or that of the file that the keys file names."""
    from asgi_llm_guard.identity.keys import read_toml

    identity, file = _keys_file(tool)
    secret = getattr(identity, "secret", None)
    if secret is not None:
        several = secret if isinstance(secret, (list, tuple)) else [secret]
        return str(several[0].get_secret_value())
    named = read_toml(file).get("secret_file") if file is not None else None
    if file is None or not isinstance(named, str):
        raise ConfigurationError(
            f"{tool.path}: identity.secret: is missing; set LLM_GUARD_IDENTITY__SECRET, or secret_file in the keys file"
        )
    return (file.parent / named).read_text(encoding="utf-8").strip()


def _of_file(tool: Tool) -> list[dict[str, Any]]:
    from asgi_llm_guard.identity.keys import read_toml

    _, file = _keys_file(tool)
    entries = [] if file is None else read_toml(file).get("keys", [])
    return [
        {
            "id": entry.get("id"),
            "caller": entry.get("caller"),
            "user": entry.get("user"),
            "departments": list(entry.get("departments", ())),
            "agent": entry.get("agent"),
            "expires_at_ms": None if "expires_at" not in entry else round(entry["expires_at"].timestamp() * 1000),
            "revoked": False,
        }
        for entry in entries
    ]


def _show_entry(tool: Tool, key: str, record: ApiKey) -> None:
    document = {"key": key, "id": record.id, "digest": record.digest, "entry": record.to_toml()}
    tool.show(
        document,
        lambda: (
            f"{click.style('The key, shown once:', bold=True)}\n\n  {key}\n\n"
            f"Add this to the keys file:\n\n{record.to_toml().rstrip()}"
        ),
    )


# --------------------------------------------------------------------------- administration data


async def _of_control(control: Any) -> list[dict[str, Any]]:
    state = await control.state()
    return [
        {
            "id": key.id,
            "caller": key.caller,
            "user": key.user,
            "departments": list(key.departments),
            "agent": key.agent,
            "expires_at_ms": key.expires_at_ms,
            "revoked": key.revoked_ms is not None,
        }
        for key in (entry.value for entry in state.keys.values())
    ]


def _over(row: Mapping[str, Any], now_ms: int) -> bool:
    return bool(row["revoked"]) or (row["expires_at_ms"] is not None and row["expires_at_ms"] <= now_ms)


def _end_told(key: Key) -> str:
    return "it is revoked" if key.expires_at_ms is None else f"{instant(key.expires_at_ms)} UTC"


def _show_new(tool: Tool, shown: str, kept: Key) -> None:
    document = {"key": shown, "id": kept.id, "caller": kept.caller, "expires_at_ms": kept.expires_at_ms}
    tool.show(
        document,
        lambda: (
            f"{click.style('The key, shown once:', bold=True)}\n\n  {shown}\n\n"
            f"It is {kept.id} of {kept.caller}, and holds until {_end_told(kept)}."
        ),
    )
