"""Fixtures for the tests of sweeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gsdg.utils.errors import UserError


@pytest.fixture
def refusal() -> Callable[..., str]:
    """A function that makes a call and returns the message of the UserError that it raises; "" if it raises none."""

    def refusal(call: Callable, *arguments: object, **named: object) -> str:
        try:
            call(*arguments, **named)
        except UserError as error:
            return str(error)
        return ""

    return refusal
