"""The program and its list of commands. Nothing but the command that was asked for is imported."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import click

from asgi_llm_guard.cli.failures import Exit, Failure
from asgi_llm_guard.errors import GuardError

__all__ = ["Late", "program"]

_PACKAGE: Final = "asgi_llm_guard.cli"

Listing = Mapping[str, tuple[str, str]]
"""For each command where it is (`module:name`, inside this package), and one line of help."""

_COMMANDS: Final[Listing] = {
    "check": ("check:check", "Validate the configuration, and look for what is wrong with it in use."),
    "serve": ("serve:serve", "Run the gateway that the configuration describes."),
    "usage": ("reports:usage", "What was used in a period, by department, user, model, day, …"),
    "top": ("reports:top", "Who has used most."),
    "sessions": ("reports:sessions", "Sessions with calls lately: whose, how many calls, what they cost."),
    "reset": ("changes:reset", "Set what somebody has used back to zero."),
    "raise": ("changes:raise_", "Lift a limit for a while."),
    "kill": ("changes:kill", "Stop a caller, user, session, agent, department, a model, or everything."),
    "keys": ("keys:keys", "API keys: new, list, rotate, revoke, hash."),
    "prices": ("prices:prices", "The price list: what would change, and take it."),
    "ledger": ("ledger:ledger", "Usage records: drain, export, reprice, rollup, retain, reconcile."),
    "migrate": ("migrate:migrate", "Copy one storage into another, and compare."),
    "simulate": ("simulate:simulate", "Replay a past period under other policies: who would have been refused?"),
    "bench": ("bench:bench", "Measure admission and settlement on the configured storage."),
}


class Late(click.Group):
    """A group whose commands are imported when they are run, and not to be listed."""

    listing: Listing = MappingProxyType({})

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.listing)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        place = self.listing.get(cmd_name)
        if place is None:
            return None
        module, _, name = place[0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.listing.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GuardError as error:
            raise Failure.of(error) from error
        except click.Abort as error:  # of a question that was answered with no, or with Ctrl-C
            raise Failure("Nothing was done.", Exit.USAGE) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            raise click.exceptions.Exit(Exit.INTERRUPTED) from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # click ends quietly where nobody reads on
                raise
            raise Failure(f"{error.filename or 'a file'}: {error.strerror or error}", Exit.FOUND) from error


@click.group(
    cls=Late,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 well, 1 something was found, 2 usage, 3 configuration, 4 a store is away, 5 changed meanwhile.",
)
@click.version_option(package_name="asgi-llm-guard", message="%(prog)s %(version)s")
def program() -> None:
    """Budgets, quotas and loops of LLM calls: see them, check them, change them.

    Every command reads the settings file that the service reads: --config, else $LLM_GUARD_CONFIG, else guard.toml.
    With --json it prints one JSON document for programs.
    """
    # What goes wrong is said once, by the command; `serve` has handlers of its own.
    logging.getLogger("asgi_llm_guard").addHandler(logging.NullHandler())


program.listing = _COMMANDS
