"""How commands that measure hand their figures over: a table for people, JSON for scripts."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bascule.errors import ConfigError


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
    try:
        Path(target).write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the report to {target}: {error}") from error
