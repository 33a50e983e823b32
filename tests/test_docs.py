"""The Python in README.md and docs/ runs, and the links between the pages lead somewhere.

The blocks of one page run in order, as one program in an empty folder; `await` is allowed at the top
level. A block that cannot run says why in a comment on the line above it: `<!-- not run: reason -->`.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
FENCE = "```"


class Block(NamedTuple):
    language: str
    line: int
    """The first line of the code, counted from 1."""
    code: str
    reason: str | None
    """Why it is not run; `None` if it is."""


def blocks(page: str) -> Iterator[Block]:
    """Every fenced block of a page."""
    lines = page.splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if start is None and line.startswith(FENCE):
            start = number
        elif start is not None and line.rstrip() == FENCE:
            marked = NOT_RUN.fullmatch(lines[start - 1].strip()) if start else None
            yield Block(
                language=lines[start].removeprefix(FENCE).strip(),
                line=start + 2,
                code="\n".join(lines[start + 1 : number]),
                reason=marked and marked["reason"],
            )
            start = None
    assert start is None, f"the block that begins on line {(start or 0) + 1} does not end"


def compiled(block: Block, path: str) -> CodeType:
    """The block as code whose tracebacks show the lines of the page."""
    padded = "\n" * (block.line - 1) + block.code
    code = compile(padded, path, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    assert isinstance(code, CodeType)
    return code


def run(page: str, path: str) -> int:
    """Run the Python of a page; how many blocks that were."""
    program = ModuleType("__page__")
    sys.modules[program.__name__] = program  # where libraries look up what annotations mean
    wanted = [block for block in blocks(page) if block.language == "python" and block.reason is None]
    try:
        with asyncio.Runner() as runner:
            for block in wanted:
                outcome = eval(compiled(block, path), program.__dict__)
                if inspect.iscoroutine(outcome):
                    runner.run(outcome)
    finally:
        del sys.modules[program.__name__]
    return len(wanted)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """Every Python block that does not say why not runs without an error or a warning."""
    with chdir(tmp_path):
        run(page.read_text("utf-8"), name(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link to a file of the repository finds it."""
    targets = [match["target"] for match in LINK.finditer(page.read_text("utf-8"))]
    local = [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]

    assert [target for target in local if not (page.parent / target).exists()] == []


def test_index_lists_every_page() -> None:
    """`docs/index.md` links to every other page."""
    index = ROOT / "docs" / "index.md"
    linked = {match["target"] for match in LINK.finditer(index.read_text("utf-8"))}

    assert [name(page) for page in PAGES[1:] if page != index and page.name not in linked] == []


PAGE = """
```python
import asyncio
seen = [1]
```
<!-- not run: needs a key -->
```python
raise SystemExit
```
```console
$ not python
```
```python
await asyncio.sleep(0)
seen.append(2)
assert seen == {expected}
```
"""


def test_blocks_share_a_program() -> None:
    """The blocks of a page run in order and see each other's names; marked and foreign ones are left out."""
    assert run(PAGE.format(expected="[1, 2]"), "page.md") == 2


def test_failing_blocks_fail() -> None:
    """An error in a block is an error here, on the line of the page."""
    with pytest.raises(AssertionError) as caught:
        run(PAGE.format(expected="[]"), "page.md")

    assert caught.traceback[-1].lineno + 1 == PAGE.splitlines().index("assert seen == {expected}") + 1


def test_unclosed_blocks_are_found() -> None:
    """A block without an end is not silently left out."""
    with pytest.raises(AssertionError, match="begins on line 1 does not end"):
        run("```python\n1 / 0\n", "page.md")
