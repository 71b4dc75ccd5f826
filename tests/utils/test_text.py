"""Tables as aligned text. Text with any bytes in it is tested in data/test_any_bytes.py."""

from __future__ import annotations

import pytest

from gsdg.utils.text import align_columns


def test_columns_are_left_aligned_or_numbers_are_right_aligned_except_in_the_first_column():
    rows = [["run", "steps", "state"], ["a", "5000", "done"], ["bbbb", "7", ""]]
    assert align_columns(rows) == ["run   steps  state", "a     5000   done", "bbbb  7"]
    rows = [["", "images", "all"], ["photo", "12", "1,670"]]
    assert align_columns(rows, numbers=True) == ["       images    all", "photo      12  1,670"]
    assert align_columns([]) == []
    with pytest.raises(ValueError):
        align_columns([["a", "b"], ["c"]])
