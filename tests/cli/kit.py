"""The program as it is run: in this process for most, as a process of its own where that matters."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from asgi_llm_guard import Context, Guard, Usage
from asgi_llm_guard.cli.root import program
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.storage.sqlite import SqliteStorage
from asgi_llm_guard.testing import FrozenClock

MODELS = ("openai/gpt-4o-mini", "openai/gpt-4o", "anthropic/claude-haiku-4-5")


def call(*arguments: str | Path, stdin: str | None = None, env: Mapping[str, str] | None = None) -> Result:
    """Run a command in this process."""
    runner = CliRunner(env={"LLM_GUARD_CONFIG": None, "WEB_CONCURRENCY": None, "COLUMNS": None} | dict(env or {}))
    return runner.invoke(program, [*map(str, arguments)], input=stdin, prog_name="asgi-llm-guard")


def document(*arguments: str | Path, code: int = 0, **options: Any) -> Any:
    """What a command prints with --json."""
    ran = call(*arguments, "--json", **options)
    assert ran.exit_code == code, ran.output
    return json.loads(ran.stdout)


def process(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the installed program as a process of its own, in `cwd`."""
    return subprocess.run(
        [sys.executable, "-c", "from asgi_llm_guard.cli import main; main()", *map(str, arguments)],
        cwd=cwd,
        env=clean_environment() | dict(env or {}),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def at_terminal(*arguments: str | Path, until: bytes, answer: bytes, asks: bool = True) -> tuple[bytes, int]:
    """Run the program at a terminal of its own and type `answer` when it has said `until`, and reads what is typed if it
    `asks`; all that it said, and its exit code."""
    command = ["-c", "from asgi_llm_guard.cli import main; main()", *map(str, arguments)]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, where the tests run in the background of a shell
        os.execve(sys.executable, [sys.executable, *command], clean_environment())
    said, typed, ends_s = b"", False, time.monotonic() + 120
    try:
        while select.select([terminal], [], [], max(0.0, ends_s - time.monotonic()))[0]:
            try:
                more = os.read(terminal, 65_536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not more:
                break
            said += more
            if not typed and until in said:
                typed = True
                if asks:
                    _until_reading(pid)
                os.write(terminal, answer)
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(terminal)
    return said, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _until_reading(pid: int) -> None:
    """Wait until a program that has asked sleeps in its read: between the two it takes note of a signal, and reads on."""
    asleep, ends_s = 0, time.monotonic() + 30
    while asleep < 20 and time.monotonic() < ends_s:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.001)


def clean_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LLM_GUARD_") and name not in {"COLUMNS", "WEB_CONCURRENCY"}
    }


def settings(folder: Path, text: str, *, storage: str | None = None) -> Path:
    """A settings file over a SQLite file in `folder`, unless it says otherwise."""
    file = folder / "guard.toml"
    url = storage or f"sqlite:///{folder / 'guard.db'}"
    file.write_text(f'storage = "{url}"\n{text}', "utf-8")
    return file


def fill(folder: Path, policies: Sequence[Policy] = (), *, calls: int = 60, unpriced: int = 0) -> int:
    """Calls of the last hours in `guard.db`; gives what they have cost, in nano-USD."""

    async def work() -> int:
        now_ms = time.time_ns() // 1_000_000
        clock = FrozenClock(now_ms - calls * 60_000)
        guard = Guard(policies, storage=SqliteStorage(str(folder / "guard.db"), clock=clock), clock=clock)
        for number in range(calls):
            context = Context(
                caller="team",
                user=f"user-{number % 4}",
                departments=("research",) if number % 3 else ("sales", "support"),
                agent="researcher",
                session=f"session-{number % 5}",
                request_id=f"request-{number}",
            )
            async with guard.open(context):
                model = "acme/unknown" if number < unpriced else MODELS[number % 3]
                async with guard.call(model=model, input_tokens=1_000, max_output_tokens=500) as made:
                    clock.advance(seconds=2)
                    made.record(Usage(input_tokens=800, output_tokens=10 * (number % 50)))
            clock.advance(seconds=50)
        records = await guard.storage.records()
        assert guard.books is not None
        await guard.books.flush()
        await guard.aclose()
        return sum(record.cost_nanousd or 0 for record in records)

    return asyncio.run(work())
