"""On which line of a TOML file a key stands: the parser that reads it does not say."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from typing import Final

__all__ = ["line_in"]

_PART: Final = re.compile(r"""\s*(?:("(?:[^"\\]|\\.)*")|'([^']*)'|([A-Za-z0-9_-]+))\s*""")
_HEADER: Final = re.compile(r"\s*\[\[?")
_STRING: Final = r'"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'"
_LONG: Final = r'"""(?:[^\\]|\\.)*?"{3,5}|' + r"'''.*?'{3,5}"
_TEXT: Final = re.compile(f"(?P<long>{_LONG})|(?P<comment>#[^\n]*)|{_STRING}", re.DOTALL)
_SHORT_TEXT: Final = re.compile(_STRING)

_Path = tuple[str | int, ...]


def line_in(text: str, path: Sequence[str | int]) -> int | None:
    """The line, counted from 1, of the key that `path` leads to (`("policies", 0, "limit")`).

    Where the key has no line of its own (it is missing, or stands inside an inline table), that of what is nearest
    around it; of a table that is only named with what is in it (`[[alerts.webhooks]]`), the first such line. `None`: nothing
    of it is there.
    """
    wanted: _Path = tuple(path)
    best, line = 0, None
    for number, found in _keys(text):
        if len(found) > best and wanted[: len(found)] == found:
            best, line = len(found), number
        elif line is None and wanted and found[: len(wanted)] == wanted:
            line = number
    return line


def _keys(text: str) -> list[tuple[int, _Path]]:
    """Every table and key with its line, in order."""
    keys: list[tuple[int, _Path]] = []
    counts: dict[_Path, int] = {}
    table: _Path = ()
    depth = 0
    # By line feeds alone, as TOML counts: other characters that end lines elsewhere may stand in its strings.
    for number, line in enumerate(_TEXT.sub(_short, text).split("\n"), 1):
        if not depth and (header := _HEADER.match(line)) is not None:
            parts = _parts(line, header.end(), "]")
            if parts:
                table = _placed(parts, counts, opens=header[0].endswith("[["))
                keys.append((number, table))
            continue
        if not depth:
            parts = _parts(line, 0, "=")
            keys += [(number, table + parts[:length]) for length in range(1, len(parts) + 1)]
        bare = _SHORT_TEXT.sub("", line)
        depth = max(0, depth + bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}"))
    return keys


def _short(match: re.Match[str]) -> str:
    """What the text stands for while lines are counted: nothing of a comment, and the line feeds of a long string."""
    if match["comment"] is not None:
        return ""
    return match[0] if match["long"] is None else '""' + "\n" * match[0].count("\n")


def _parts(line: str, at: int, end: str) -> tuple[str, ...]:
    """The parts of the dotted key from there to `end`; empty: there is none."""
    parts: list[str] = []
    while (match := _PART.match(line, at)) is not None:
        quoted, literal, bare = match.groups()
        parts.append(_unquoted(quoted) if quoted is not None else bare if literal is None else literal)
        at = match.end()
        if line[at : at + 1] == end:
            return tuple(parts)
        if line[at : at + 1] != ".":
            break
        at += 1
    return ()


def _unquoted(quoted: str) -> str:
    try:
        return str(tomllib.loads(f"key = {quoted}")["key"])
    except tomllib.TOMLDecodeError:
        return quoted  # of a text that is no TOML; it is the name of nothing


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
