"""Break the code in small ways, one at a time, and list the breaks that no test notices.

`python tests/mutants/run.py [part of a name …]`. Exits with 1 if a mutant survives that is not in
`equivalent.toml`, or if one that is listed there does not survive (the list is to stay true).
Each mutant runs in a process of its own that was forked after everything else was imported.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import io
import os
import resource
import signal
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Imported before the forks, once for all.
import anyio.pytest_plugin  # noqa: E402, F401
import hypothesis.stateful  # noqa: E402, F401
import pytest  # noqa: E402
from tests.mutants.mutate import Mutant, mutants  # noqa: E402

SOURCES = ROOT / "src" / "asgi_llm_guard"
CPU_S = 60
"""A mutant that computes for so long loops; that is noticed, too."""
TIMEOUT_S = 300
"""So does one that waits for so long, on a machine that others use as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A module to break, and the tests that should notice, the quickest first."""

    module: str
    suites: tuple[tuple[str, ...], ...]
    functions: frozenset[str] | None = None

    @property
    def path(self) -> Path:
        return SOURCES / (self.module.removeprefix("asgi_llm_guard.").replace(".", "/") + ".py")


_STORAGE = (
    (
        "tests/storage/test_contract.py",
        "tests/storage/test_found.py",
        "-k",
        "not (sqlite or redis or valkey or sentinel or cluster)",
    ),
    ("tests/storage/test_cells.py", "tests/storage/test_memory.py"),
    ("tests/mutants/histories.py",),
)
TARGETS = (
    Target(module="asgi_llm_guard.storage.cells", suites=_STORAGE),
    Target(module="asgi_llm_guard.storage.counting", suites=_STORAGE),
    Target(module="asgi_llm_guard.storage.releasing", suites=_STORAGE),
    Target(module="asgi_llm_guard.storage.state", suites=_STORAGE),
    Target(module="asgi_llm_guard.storage.taking", suites=_STORAGE),
    Target(
        module="asgi_llm_guard.charge",
        suites=(("tests/mutants/test_plan.py", "tests/engine/test_charge.py"), ("tests/engine/test_outcomes.py",)),
    ),
    Target(
        module="asgi_llm_guard.plan",
        suites=(("tests/mutants/test_plan.py", "tests/policies/test_outage_options.py"), ("tests/engine",)),
    ),
    Target(
        module="asgi_llm_guard.pricing.bill",
        suites=(("tests/pricing/test_rules.py", "tests/pricing/test_costs.py"),),
    ),
    Target(module="asgi_llm_guard.learning", suites=(("tests/pricing/test_learning.py",),)),
)


# As `make test`, but quicker to fail; what was imported before the fork cannot be rewritten, which is all right.
_OPTIONS = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--assert=plain"]
_OPTIONS += ["-p", "anyio.pytest_plugin", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from the given source."""

    def __init__(self, target: Target, source: str) -> None:
        self.target = target
        self.source = source

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.target.module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, str(self.target.path), "exec"), module.__dict__)


def survivors_of(jobs: list[tuple[Target, Mutant]]) -> Iterator[Mutant]:
    """The mutants whose tests all pass, as they are found; each runs in a process of its own, as many at once as there are processors."""
    running: dict[int, tuple[int, float]] = {}
    waiting = list(enumerate(jobs))[::-1]
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            number, (target, mutant) = waiting.pop()
            pid = os.fork()
            if not pid:
                os._exit(_child(target, mutant))
            running[pid] = (number, time.monotonic() + TIMEOUT_S)
        for pid, (number, deadline) in list(running.items()):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                if os.waitstatus_to_exitcode(status) == 0:
                    yield jobs[number][1]
        time.sleep(0.01)


def _child(target: Target, mutant: Mutant) -> int:
    told = os.dup(1)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device, not a file
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # finding them takes longer than the tests
    sys.meta_path.insert(0, Broken(target, mutant.source))
    try:
        for suite in target.suites:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                code = pytest.main([*_OPTIONS, *suite])
            if code:
                if not mutant.line:  # it is no mutant
                    os.write(told, output.getvalue().encode())
                return 1
            for name in [name for name in sys.modules if name.startswith("tests.")]:
                del sys.modules[name]
    except BaseException:  # noqa: BLE001 - a mutant may do anything; whatever ends the tests was noticed
        return 1
    return 0


def main(wanted: list[str]) -> int:
    os.chdir(ROOT)
    with (ROOT / "tests" / "mutants" / "equivalent.toml").open("rb") as file:
        known = {name for entry in tomllib.load(file)["equivalent"] for name in entry["mutants"]}
    jobs = [
        (target, mutant)
        for target in TARGETS
        for mutant in mutants(target.path, target.functions)
        if not wanted or any(part in mutant.name for part in wanted)
    ]
    started = time.monotonic()
    whole = [(t, Mutant(name=t.module, line=0, source=t.path.read_text(encoding="utf-8"))) for t in TARGETS]
    whole = [(target, as_is) for target, as_is in whole if any(target is job[0] for job in jobs)]
    for module in sorted({as_is.name for _, as_is in whole} - {as_is.name for as_is in survivors_of(whole)}):
        _say(f"the tests of {module} fail without any mutant; run `make test` first")
        return 1
    survivors: set[str] = set()
    for mutant in survivors_of(jobs):
        survivors.add(mutant.name)
        if mutant.name not in known:
            _say(f"SURVIVES line {mutant.line}  {mutant.name}")
    new = survivors - known
    dead = sorted(known & {m.name for _, m in jobs} - survivors)
    gone = sorted(known - {m.name for _, m in jobs}) if not wanted else []
    for name in dead:
        _say(f"LISTED AS EQUIVALENT, BUT NOTICED  {name}")
    for name in gone:
        _say(f"LISTED AS EQUIVALENT, BUT GONE  {name}")
    _say(
        f"{len(jobs)} mutants, {len(jobs) - len(survivors)} noticed, {len(survivors) - len(new)} known to be "
        f"equivalent, {len(new)} not noticed; {time.monotonic() - started:.0f} s"
    )
    return 1 if new or dead or gone else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
