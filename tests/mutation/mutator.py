"""Finds every possible single mutant of a Python source file: a copy of the file with one small, wrong change.

Only the text of the changed operator, constant, expression or statement is replaced. Type annotations, decorators,
f-strings (mostly messages), argparse help texts, `__all__` and the `__main__` guard are never mutated.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
}
BOOLEAN = {ast.And: ("and", "or"), ast.Or: ("or", "and")}
OPERATORS = {**COMPARISONS, **ARITHMETIC, **BOOLEAN}
EXACT_OPPOSITES = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)  # swapping one negates the condition
# With one of these as an operand, the arithmetic mutant would only raise a TypeError.
NOT_NUMBERS = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp, ast.Dict)
UNMUTATED_FIELDS = {"annotation", "returns", "decorator_list"}
HELP_KEYWORDS = {"help", "description", "epilog", "usage", "metavar", "prog"}

Change = tuple[str, int, int, str]  # kind, first byte, byte after the last one, the new text


@dataclass(frozen=True)
class Mutant:
    """One change of one file. path: relative to the repository; line, column: from 1; start, end: bytes."""

    path: str
    line: int
    column: int
    kind: str
    start: int
    end: int
    old: str
    new: str

    @property
    def name(self) -> str:
        """Identifies the mutant as long as the file does not change."""
        return f"{self.path}:{self.line}:{self.column}:{self.kind}"

    def apply(self, text: str) -> str:
        """The text of the whole file with this change."""
        data = text.encode()
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()


def mutants_of(path: str, text: str) -> list[Mutant]:
    """All mutants of the file `path` with this text, in the order of their positions."""
    source = Source(text)
    changes = [change for node in _mutable_nodes(ast.parse(text)) for change in _changes(source, node)]
    return [_mutant(path, source.data, *change) for change in sorted(changes, key=lambda change: change[1])]


def _mutant(path: str, data: bytes, kind: str, start: int, end: int, new: str) -> Mutant:
    line = data.count(b"\n", 0, start) + 1
    column = len(data[data.rfind(b"\n", 0, start) + 1 : start].decode()) + 1
    return Mutant(path, line, column, kind, start, end, data[start:end].decode(), new)


class Source:
    """The bytes of a file and the positions of syntax nodes in it (the columns of ast count UTF-8 bytes)."""

    def __init__(self, text: str) -> None:
        self.data = text.encode()
        self._line_starts = list(accumulate(map(len, self.data.splitlines(keepends=True)), initial=0))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """The first byte of a node, and the byte after its last one."""
        starts = self._line_starts
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def operator(self, left: ast.AST, operator: str, right: ast.AST) -> tuple[int, int]:
        """The span of the operator between two operands; parentheses and comments may stand there too."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), self.data[start:end])
        first, last = re.search(r"\s+".join(map(re.escape, operator.split())).encode(), gap).span()
        return start + first, start + last


def _mutable_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The node and everything below it, without the parts that are never mutated."""
    if _is_left_out(node):
        return
    yield node
    for field, value in ast.iter_fields(node):
        if field not in UNMUTATED_FIELDS:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _mutable_nodes(child)


def _is_left_out(node: ast.AST) -> bool:
    # Python 3.11 and older give wrong positions for the nodes inside an f-string.
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in HELP_KEYWORDS):
        return True
    guard = ast.unparse(node.test) if isinstance(node, ast.If) else ""
    exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    return exports or "TYPE_CHECKING" in guard or guard.startswith("__name__ ==")


def _changes(source: Source, node: ast.AST) -> Iterator[Change]:
    """Every change whose cause is this node."""
    yield from _operator_changes(source, node)
    yield from _condition_changes(source, node)
    yield from _constant_changes(source, node)
    yield from _statement_changes(source, node)
    yield from _default_changes(source, node)


def _operator_changes(source: Source, node: ast.AST) -> Iterator[Change]:
    for kind, left, operator, right in _operations(node):
        if type(operator) in OPERATORS:
            old, new = OPERATORS[type(operator)]
            yield kind, *source.operator(left, old, right), new


def _operations(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST, ast.AST]]:
    """(kind, left operand, operator, right operand) for each operator that belongs to this node."""
    if isinstance(node, ast.Compare):
        for (left, right), operator in zip(pairwise([node.left, *node.comparators]), node.ops, strict=True):
            yield "comparison", left, operator, right
    elif isinstance(node, ast.BoolOp):
        for left, right in pairwise(node.values):
            yield "boolean", left, node.op, right
    elif isinstance(node, ast.BinOp) and not (_is_no_number(node.left) or _is_no_number(node.right)):
        yield "arithmetic", node.left, node.op, node.right


def _is_no_number(node: ast.AST) -> bool:
    return isinstance(node, NOT_NUMBERS) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _condition_changes(source: Source, node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        start = source.span(node)[0]
        yield "not", start, start + re.match(rb"not\s*", source.data[start:]).end(), ""
    tests = [node.test] if isinstance(node, ast.If | ast.IfExp) else getattr(node, "ifs", [])
    for test in tests:
        if not _is_negated_by_another_change(test):
            start, end = source.span(test)
            yield "condition", start, end, f"not ({source.data[start:end].decode()})"


def _is_negated_by_another_change(test: ast.AST) -> bool:
    one_comparison = isinstance(test, ast.Compare) and len(test.ops) == 1
    return (one_comparison and isinstance(test.ops[0], EXACT_OPPOSITES)) or (
        isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    )


def _constant_changes(source: Source, node: ast.AST) -> Iterator[Change]:
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bool):
        yield "bool", *source.span(node), str(not value)
    elif isinstance(value, int):
        yield "integer", *source.span(node), str(value + 1)
    elif isinstance(value, float):
        yield "float", *source.span(node), repr(2 * value or 1.0)


def _statement_changes(source: Source, node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "statement", *source.span(node), "pass"
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "return", *source.span(node.value), "None"


def _default_changes(source: Source, node: ast.AST) -> Iterator[Change]:
    for default in _defaults(node):
        value = default.value if isinstance(default, ast.Constant) else ...
        if isinstance(value, str):
            yield "default", *source.span(default), repr(value + "_")
        elif value is None:
            yield "default", *source.span(default), "0"
        elif value is ... and not isinstance(default, ast.UnaryOp):  # numbers and booleans are changed as constants
            yield "default", *source.span(default), "None"


def _defaults(node: ast.AST) -> list[ast.AST]:
    """Default values: of parameters, of `.get`, `.pop` and `getattr`, and of a keyword `default=`."""
    if isinstance(node, ast.arguments):
        return [default for default in (*node.defaults, *node.kw_defaults) if default is not None]
    if isinstance(node, ast.keyword) and node.arg == "default":
        return [node.value]
    if isinstance(node, ast.Call):
        lookup = isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop")
        getter = isinstance(node.func, ast.Name) and node.func.id == "getattr"
        return node.args[1:2] if lookup else node.args[2:3] if getter else []
    return []
