"""Small breaks of a source file, the same ones in the same order on every run.

A mutant is named by file, function, what it changes and into what, and the how-manieth such place in
the function it is, so that its name outlives changes elsewhere.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mutant", "mutants"]

_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One break: its name, where it is, and the whole source with it."""

    name: str
    line: int
    source: str


def mutants(path: Path, functions: frozenset[str] | None = None) -> Iterator[Mutant]:
    """All mutants of the file, or of the named functions (and classes) of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    seen: Counter[str] = Counter()
    for top in tree.body:
        if not isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if functions is not None and top.name not in functions:
            continue
        for node in _walk(top):
            for undo in _breaks(node):
                before, after = undo
                name = f"{path.name}::{top.name}::{before} -> {after}"
                seen[name] += 1
                number = f" #{seen[name]}" if seen[name] > 1 else ""
                yield Mutant(name=name + number, line=getattr(node, "lineno", 0), source=ast.unparse(tree))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """The node and all below it, but for how classes are made (`frozen`, `slots`, `gc`), which is not behaviour."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.ClassDef) and (child in node.decorator_list or child in node.keywords)):
            yield from _walk(child)


def _breaks(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Change the node in place, once for each way to break it; says from what into what."""
    if isinstance(node, ast.Compare):
        for n, op in enumerate(node.ops):
            before = ast.unparse(node)
            node.ops[n] = _COMPARE[type(op)]()
            yield before, ast.unparse(node)
            node.ops[n] = op
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC:
        before, op_was = ast.unparse(node), node.op
        node.op = _ARITHMETIC[type(op_was)]()
        yield before, ast.unparse(node)
        node.op = op_was
    elif isinstance(node, ast.BoolOp):
        before, bool_was = ast.unparse(node), node.op
        node.op = ast.Or() if isinstance(bool_was, ast.And) else ast.And()
        yield before, ast.unparse(node)
        node.op = bool_was
    elif isinstance(node, ast.Constant) and type(node.value) in {bool, int}:
        value = node.value
        before = ast.unparse(node)
        node.value = (not value) if isinstance(value, bool) else value + 1  # type: ignore[operator]
        yield before, ast.unparse(node)
        node.value = value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        before, called = ast.unparse(node), node.func.id
        node.func.id = _CALLS[called]
        yield before, ast.unparse(node)
        node.func.id = called
    if isinstance(node, ast.If | ast.While | ast.IfExp) and not (
        isinstance(node, ast.While) and isinstance(node.test, ast.Constant)
    ):
        before, test = ast.unparse(node.test), node.test
        node.test = ast.UnaryOp(ast.Not(), copy.deepcopy(test))
        yield f"if {before}", f"if not ({before})"
        node.test = test
    for block in ("body", "orelse", "finalbody"):
        lines = getattr(node, block, None)
        if not isinstance(lines, list):
            continue
        for n, line in enumerate(lines):
            if _may_go(line):
                lines[n] = ast.copy_location(ast.Pass(), line)
                yield ast.unparse(line), "pass"
                lines[n] = line


def _may_go(line: ast.stmt) -> bool:
    """Whether the statement may be left out: it does something, and what follows can do without its names."""
    if isinstance(line, ast.Expr):
        return not isinstance(line.value, ast.Constant)
    if isinstance(line, ast.Assign):
        return not all(isinstance(target, ast.Name) for target in line.targets)
    return isinstance(line, ast.AugAssign | ast.Delete | ast.Continue | ast.Break | ast.Raise)
