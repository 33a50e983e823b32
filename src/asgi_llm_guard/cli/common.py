"""What the commands share: where the settings are, what is printed for people and what for programs, confirmation."""

from __future__ import annotations

import asyncio
import functools
import getpass
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from asgi_llm_guard.cli.failures import Exit, Failure
from asgi_llm_guard.cli.files import Part, check_file, missing_file
from asgi_llm_guard.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_llm_guard.guard import Guard
    from asgi_llm_guard.settings import GuardSettings

__all__ = [
    "CONFIG_VARIABLE",
    "Tool",
    "actor_name",
    "check_reason",
    "command_options",
    "confirm",
    "progress",
    "reason_option",
    "run",
    "with_urls",
]

CONFIG_VARIABLE: Final = "LLM_GUARD_CONFIG"
_DEFAULT: Final = "guard.toml"
_MOST_REASON: Final = 500

T = TypeVar("T")
Function = Callable[..., Any]


class Tool:
    """One run of a command: its settings file, and how it prints."""

    def __init__(self, config: str, *, as_json: bool, storage: str | None = None, **urls: str | None) -> None:
        self.path = Path(config)
        self.as_json = as_json
        self.storage = storage
        """A URL in place of the settings'."""
        self._urls: dict[str, str] = {name: url for name, url in urls.items() if url is not None}

    @property
    def in_memory(self) -> bool:
        """Whether usage is kept in the memory of the service's process, and nowhere else."""
        settings = self.settings()
        if settings.ledger is not None and settings.ledger.url is not None:
            return False
        return self.storage_url(settings).startswith("memory:")

    def settings(self) -> GuardSettings:
        """What the file, the environment and secret files say, with the URLs of the command line in place of theirs.

        Raises:
            ConfigurationError: one of them is wrong.
        """
        if not self.path.exists():
            raise ConfigurationError(
                f"{self.path}: there is no such file; name the settings with --config FILE or {CONFIG_VARIABLE}"
            )
        from asgi_llm_guard.settings import load_settings

        settings = load_settings(self.path)
        return with_urls(settings, self._urls)

    def storage_url(self, settings: GuardSettings) -> str:
        """Where the counters are: never to be shown, because it may hold a password."""
        return self.storage or settings.storage.get_secret_value()

    def told(self, part: Part) -> bool:
        """Whether the command line names the database of this part."""
        return part in self._urls

    def url_of(self, part: Part, settings: GuardSettings) -> str | None:
        """Where a part is kept; `None`: nowhere, or it is in no file and needs none. Never to be shown: it may hold a
        password."""
        if part == "storage":
            return self.storage_url(settings)
        table = settings.ledger if part == "ledger" else settings.control
        if table is not None and table.url is not None:
            return table.url.get_secret_value()
        return None if table is None or part == "ledger" else settings.own_database

    def missing(self, part: Part, settings: GuardSettings) -> Path | None:
        """The SQLite file of a part that is not there; `None`: there is one, or it is none of that kind."""
        return missing_file(self.url_of(part, settings) or "")

    def tell_made(self, part: Part, settings: GuardSettings) -> None:
        """Say on stderr that a file is not there and will be made, for those who thought that it was."""
        if (file := self.missing(part, settings)) is not None:
            click.echo(f"{file.absolute()}: was not there, and is made", err=True)

    def check(self, part: Part, settings: GuardSettings, *, new: bool = False) -> None:
        """Check that the file of a part is there, and has that part in it; `new`: it is made where it is not.

        Raises:
            ConfigurationError: it is not.
        """
        table = None if part == "storage" else getattr(settings, part)
        own = part == "storage" or table is None or table.url is None
        said = f"--{part}" if self.told(part) else f"{self.path}: {'storage' if own else f'{part}.url'}"
        shared = own and part != "storage"
        check_file(part, self.url_of(part, settings) or "", said=said, new=new, shared=shared)

    def guard(
        self,
        settings: GuardSettings | None = None,
        *,
        needs: Sequence[Part] = ("storage",),
        makes: Sequence[Part] = (),
    ) -> Guard:
        """The guard that the settings describe, with the URLs of the command line in place of theirs.

        `needs`: what the command works with; the rest is neither opened nor asked. `makes`: of these, what may be a file
        that is not there; any other one is a mistaken path, and nothing is made of it.

        Raises:
            ConfigurationError: something in the settings is wrong, or a file is not there, or another one.
        """
        from asgi_llm_guard.guard import Guard
        from asgi_llm_guard.settings import build_guard_arguments

        settings = settings or self.settings()
        for part in needs:
            self.check(part, settings, new=part in makes)
        url = self.storage_url(settings) if "storage" in needs else "memory://"
        return Guard(**build_guard_arguments(_only(settings, needs)) | {"storage": url})

    def show(self, document: object, text: Callable[[], str]) -> None:
        """Print the document for programs, or the text for people."""
        if self.as_json:
            import msgspec

            click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
        else:
            click.echo(text())


def with_urls(settings: GuardSettings, urls: Mapping[str, str]) -> GuardSettings:
    """The settings with other databases for the ledger or administration data."""
    from asgi_llm_guard.settings.operations import ControlSettings, LedgerSettings

    changed: dict[str, Any] = {}
    kinds = {"ledger": LedgerSettings, "control": ControlSettings}
    for name, url in urls.items():
        fresh, table = kinds[name](url=url), getattr(settings, name)
        changed[name] = fresh if table is None else table.model_copy(update={"url": fresh.url})
    return settings.model_copy(update=changed)


def _only(settings: GuardSettings, needs: Sequence[Part]) -> GuardSettings:
    """The settings without the databases that are not needed, and without what would need them."""
    left_out: dict[str, None] = {part: None for part in ("ledger", "control") if part not in needs}
    if "control" in left_out and settings.identity is not None and settings.identity.kind == "control":
        left_out["identity"] = None
    return settings.model_copy(update=left_out)


def command_options(function: Function) -> Function:
    """`--config` and `--json`, given to the command as `tool`."""

    @click.option(
        "--config",
        "config",
        default=_DEFAULT,
        envvar=CONFIG_VARIABLE,
        show_default=True,
        metavar="FILE",
        help="The settings file.",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
    @functools.wraps(function)
    def with_tool(
        *arguments: Any,
        config: str,
        as_json: bool,
        storage_url: str | None = None,
        ledger_url: str | None = None,
        control_url: str | None = None,
        **others: Any,
    ) -> Any:
        tool = Tool(config, as_json=as_json, storage=storage_url, ledger=ledger_url, control=control_url)
        return function(*arguments, tool=tool, **others)

    return with_tool


def ledger_option(function: Function) -> Function:
    """`--ledger URL`, in place of the settings'."""
    return click.option(
        "--ledger", "ledger_url", metavar="URL", help="Where the usage records are; default: as the settings say."
    )(function)


def control_option(function: Function) -> Function:
    """`--control URL`, in place of the settings'."""
    return click.option(
        "--control", "control_url", metavar="URL", help="Where administration data is; default: as the settings say."
    )(function)


def reason_option(function: Function) -> Function:
    """`--reason`, which the audit keeps."""
    return click.option(
        "--reason",
        required=True,
        callback=_needed_reason,
        metavar="TEXT",
        help="Why; kept in the audit beside your name.",
    )(function)


def _needed_reason(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter(f"expected a line of 1 to {_MOST_REASON} characters")
    return check_reason(context, parameter, value)


def check_reason(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """For `callback`: one printable line, as the audit keeps it; empty where none was given."""
    text = value.strip()
    if len(text) > _MOST_REASON or not text.isprintable():
        raise click.BadParameter(f"expected a line of 1 to {_MOST_REASON} characters")
    return text


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something cannot be taken back. `--yes` says it beforehand, which programs have to."""
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise Failure(f"{question} Nobody is there to say so: add --yes.", Exit.USAGE)
    click.confirm(question, abort=True, err=True)


def actor_name() -> str:
    """Who runs the command, as the operating system says."""
    try:
        return f"os:{getpass.getuser()}"
    except (KeyError, OSError):  # no such user, as in some containers
        return f"os:uid-{os.getuid()}"


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Ctrl-C ends it in good order."""
    return asyncio.run(work)


@contextmanager
def progress(label: str, *, length: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, told how far it is; nothing is written where stderr is no terminal.

    Without a `length` the number itself is shown.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _number: None
        return
    if length is None:
        try:
            yield lambda number: click.echo(f"\r{label}: {number:,}", nl=False, err=True)
        finally:
            click.echo("\r\x1b[K", nl=False, err=True)
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield lambda number: bar.update(number - bar.pos)
