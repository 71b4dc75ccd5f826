"""The mutator changes exactly one place of a file, and every mutant is valid Python."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutation.mutator import mutants_of

GSDG = Path(__file__).parents[2] / "gsdg"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = a <= b", ["x = a < b"]),
        ("x = a not  in b", ["x = a in b"]),
        ("x = é is None  # é", ["x = é is not None  # é"]),
        ("x = (a  # + é\n     ) + (b)", ["x = (a  # + é\n     ) - (b)"]),
        ("x = a and b or c", ["x = a or b or c", "x = a and b and c"]),
        ("x = not (a)", ["x = (a)"]),
        ("x = [a for a in b if a]", ["x = [a for a in b if not (a)]"]),
        ("x = 2", ["x = 3"]),
        ("x = -0.5", ["x = -1.0"]),
        ("x = True", ["x = False"]),
        ("f(a)", ["pass"]),
        ("x += a", ["pass"]),
        ("def f():\n    return a, b", ["def f():\n    return None"]),
        ("def f(a=None): ...", ["def f(a=0): ..."]),
        ("x = a.get(b, 'c')", ["x = a.get(b, 'c_')"]),
        ("x = getattr(a, b, c)", ["x = getattr(a, b, None)"]),
    ],
)
def test_each_kind_of_mutant(text, expected):
    assert [mutant.apply(text) for mutant in mutants_of("x.py", text)] == expected


@pytest.mark.parametrize(
    "text",
    [
        '"""Docstring 1."""',
        "x: Literal[1]",
        "@dataclass(frozen=True)\nclass A: ...",
        "x = f'{a + 1}'",
        "p = f(help='a' + b)",
        "__all__ = [1]",
        "if TYPE_CHECKING:\n    f(1)",
        "if __name__ == '__main__':\n    main()",
        "x = a + 'text'",
    ],
)
def test_what_is_never_mutated(text):
    assert mutants_of("x.py", text) == []


def test_names_are_unique_and_mutants_are_valid_and_differ():
    path = GSDG / "averaging" / "valley.py"
    text = path.read_text()
    mutants = mutants_of("gsdg/averaging/valley.py", text)
    assert len({mutant.name for mutant in mutants}) == len(mutants) > 20
    original = ast.dump(ast.parse(text))
    assert all(ast.dump(ast.parse(mutant.apply(text))) != original for mutant in mutants)
