"""`python -m analysis` in this process: what it prints, or the message with which it refuses."""

from __future__ import annotations

from gsdg.analysis.__main__ import main


def printed(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    """The message of a user's mistake: exit status 2, and nothing on stdout."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err
