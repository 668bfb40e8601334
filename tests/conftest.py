"""Fixtures of several files."""

import sys

import pytest

from mtcl_torchrec.cli import main


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mtcl` and gives (exit status, what it printed, what it said on stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return stopped.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def fuse(command):
    """Runs `mtcl fuse` and gives (exit status, what it printed, what it said on stderr)."""
    return lambda *arguments: command("fuse", *arguments)


@pytest.fixture
def mtcl(command):
    """Runs a command that must succeed and gives what it printed; files that try failures have one of their own."""

    def run(*arguments):
        status, out, err = command(*arguments)
        assert not status, err
        return out

    return run
