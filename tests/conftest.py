"""Fixtures of several files."""

import sys

import pytest

from mtcl_torchrec.cli import main


@pytest.fixture
def fuse(monkeypatch, capsys):
    """Runs `mtcl fuse` and gives (exit status, what it printed, what it said on stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtcl", "fuse", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return stopped.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def mtcl(monkeypatch, capsys):
    """Runs a command that must succeed and gives what it printed; files that try failures have one of their own."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        assert not stopped.value.code, out.err
        return out.out

    return run
