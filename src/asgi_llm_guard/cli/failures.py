"""How commands end: exit codes, and errors in one line."""

from __future__ import annotations

from enum import IntEnum
from typing import IO, Any, Self

import click

from asgi_llm_guard.errors import ConfigurationError, GuardError, NotInstalledError, StorageError

__all__ = ["Exit", "Failure"]


class Exit(IntEnum):
    """What the shell is told."""

    WELL = 0
    FOUND = 1
    """It ran, and found something: problems, differences, nothing where something was expected."""
    USAGE = 2
    """The command line is wrong, or a confirmation is missing or was refused."""
    CONFIGURATION = 3
    """The settings are wrong, or an optional dependency is missing."""
    AWAY = 4
    """A storage, a ledger or a database does not answer."""
    CONFLICT = 5
    """Somebody else has changed it meanwhile."""
    INTERRUPTED = 130
    """Ctrl-C, as shells say it."""


class Failure(click.ClickException):
    """An error that ends the command: one line for each problem, and the exit code that says which kind it is."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.exit_code = int(code)  # type: ignore[misc]  # click reads it from the instance

    @classmethod
    def of(cls, error: GuardError) -> Self:
        """What an error of the package is told as."""
        return cls(str(error), _code(error))

    def show(self, file: IO[Any] | None = None) -> None:
        for line in self.format_message().splitlines():
            click.secho("Error: ", fg="red", bold=True, nl=False, err=file is None, file=file)
            click.echo(line, err=file is None, file=file)


def _code(error: GuardError) -> Exit:
    if isinstance(error, (ConfigurationError, NotInstalledError)):
        return Exit.CONFIGURATION
    if isinstance(error, StorageError):
        return Exit.AWAY
    if type(error).__name__ == "Conflict":
        return Exit.CONFLICT
    return Exit.FOUND
