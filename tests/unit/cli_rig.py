"""Commands run in this process: what they print, what they say on standard error, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from bascule.cli.main import main

Run = Callable[..., tuple[int, str, str]]
"""Arguments to exit code, standard output and standard error."""


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str) -> Run:
    """Runs `bascule COMMAND` with further arguments, on a wide screen."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bascule", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return run
