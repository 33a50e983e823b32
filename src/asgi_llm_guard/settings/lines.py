"""On which line of a TOML file a key stands: the parser that reads it does not say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

__all__ = ["line_in"]

_PART: Final = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*""")
_HEADER: Final = re.compile(r"\s*(\[\[?)(.+?)\]\]?\s*(?:#.*)?$")
_LONG: Final = re.compile(r'"""|' + r"'''")

_Path = tuple[str | int, ...]


def line_in(text: str, path: Sequence[str | int]) -> int | None:
    """The line, counted from 1, of the key that `path` leads to (`("policies", 0, "limit")`).

    Where the key has no line of its own (it is missing, or stands inside an inline table), that of what is nearest
    around it; `None`: nothing of it is there.
    """
    wanted: _Path = tuple(path)
    best, line = 0, None
    for number, found in _keys(text):
        if len(found) > best and wanted[: len(found)] == found:
            best, line = len(found), number
    return line


def _keys(text: str) -> list[tuple[int, _Path]]:
    """Every table and key with its line, in order."""
    keys: list[tuple[int, _Path]] = []
    counts: dict[_Path, int] = {}
    table: _Path = ()
    inside = ""
    """What ends the long string that a line is in; empty: it is in none."""
    depth = 0
    for number, line in enumerate(text.splitlines(), 1):
        if inside:
            if line.count(inside) % 2:
                inside = ""
            continue
        if not depth and (header := _HEADER.match(line)) is not None:
            parts = _parts(header[2])
            if parts is None:
                continue
            table = _placed(parts, counts, opens=header[1] == "[[")
            keys.append((number, table))
            continue
        if not depth and (key := line.partition("=")[0]).strip() and "=" in line:
            parts = _parts(key)
            if parts is not None:
                keys += [(number, table + parts[:length]) for length in range(1, len(parts) + 1)]
        bare = re.sub(r'"(?:[^"\\]|\\.)*"|' + r"'[^']*'|#.*", "", _LONG.split(line)[0])
        depth = max(0, depth + bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}"))
        for mark in ('"""', "'''"):
            if line.count(mark) % 2:
                inside = mark
    return keys


def _parts(text: str) -> tuple[str, ...] | None:
    """The parts of a dotted key; `None`: it is none."""
    parts: list[str] = []
    at = 0
    while True:
        match = _PART.match(text, at)
        if match is None:
            return None
        parts.append(next(part for part in match.groups() if part is not None))
        at = match.end()
        if at == len(text):
            return tuple(parts)
        if text[at] != ".":
            return None
        at += 1


def _placed(parts: tuple[str, ...], counts: dict[_Path, int], *, opens: bool) -> _Path:
    """The path of a header: with the number of the entry that each array of tables on its way is at."""
    path: _Path = ()
    for part in parts[:-1]:
        path = (*path, part)
        if path in counts:
            path = (*path, counts[path])
    path = (*path, parts[-1])
    if opens:
        counts[path] = counts.get(path, -1) + 1
    return (*path, counts[path]) if path in counts else path
