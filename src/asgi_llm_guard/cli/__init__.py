"""The command line: `asgi-llm-guard`. Each group of commands has a file of its own, loaded when it is asked for."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the program on the process's arguments, and exit with its code."""
    try:
        from asgi_llm_guard.cli.root import program
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit("asgi-llm-guard needs an optional dependency: pip install 'asgi-llm-guard[cli]'")
    program(prog_name="asgi-llm-guard")
