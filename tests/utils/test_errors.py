"""The words of messages, and the checks that many constructors share."""

from __future__ import annotations

from typing import Literal

import pytest

from gsdg.utils.errors import UserError, check_literal, check_range, first_line, listing, plural


def test_words_of_messages():
    assert listing(["a", 2]) == "a, 2"
    assert listing([]) == "(none)"
    assert [plural(count, "run") for count in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert first_line(ValueError("a\nb")) == "ValueError: a"


@pytest.mark.parametrize(
    ("interval", "valid", "invalid"),
    [
        ("[0, 1]", [None, 0, 0.5, 1], [-1e-9, 1 + 1e-9]),
        ("(0, 1)", [None, 1e-9, 0.5], [0, 1, 2]),
        ("[0, 1)", [0], [1]),
        ("(0, inf)", [1e9], [0, float("inf")]),
        ("[-1, 12]", [-1, 12], [-2, 13]),
    ],
)
def test_a_bound_belongs_to_the_interval_where_its_bracket_is_square(interval, valid, invalid):
    for value in valid:
        check_range("algorithm", interval, alpha=value)
    for value in invalid:
        with pytest.raises(UserError) as caught:
            check_range("algorithm", interval, other=None, alpha=value)
        assert str(caught.value) == f"algorithm.alpha: found {value}, expected a number in {interval}."


def test_one_of_several_words():
    check_literal("layers", "all", Literal["all", "weights"])
    with pytest.raises(UserError, match=r"^layers is 'none'; valid: all, weights$"):
        check_literal("layers", "none", Literal["all", "weights"])
