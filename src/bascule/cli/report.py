"""How commands that measure hand their figures over: a table for people, JSON for scripts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from cyclopts import Parameter

from bascule.errors import ConfigError


def check_target(target: str | None) -> None:
    """Raises ConfigError for a file that could not be written; before a command does what takes long."""
    if target is None or target == "-":
        return
    path = Path(target)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write the report to {target}; give a file in a directory that is there and yours")


def _check(_: object, target: str | None) -> None:
    check_target(target)


JsonTarget: TypeAlias = Annotated[str | None, Parameter(allow_leading_hyphen=True, validator=_check)]
"""Of a flag: a file for JSON, `-` for standard output; one that cannot be written is refused at once."""


def write_json(report: object, target: str | None) -> None:
    """Write `report` (plain numbers, strings, lists and dictionaries) to the file `target`, `-` for standard output.

    Does nothing for None; raises ConfigError for a file that cannot be written.
    """
    if target is None:
        return
    text = msgspec.json.format(msgspec.json.encode(report), indent=2).decode()
    if target == "-":
        print(text)
        return
    write_text(text + "\n", target)


def write_text(text: str, target: str) -> None:
    """Write a file; raises ConfigError where that cannot be done."""
    try:
        Path(target).write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write the report to {target}: {error}") from error
