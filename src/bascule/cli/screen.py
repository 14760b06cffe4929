"""What commands say on standard error: in colours on a terminal, a plain line for each thing anywhere else."""

from __future__ import annotations

import logging
import sys
from typing import IO

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

screen = Console(stderr=True, soft_wrap=True)
"""Wraps nothing: lines of a log are searched, and commands that are shown are copied."""


def begin_log(level: str, name: str) -> None:
    """Log to standard error, as process `name`."""
    if screen.is_terminal:
        handler: logging.Handler = RichHandler(console=screen, show_path=False, rich_tracebacks=False)
        logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler])
    else:
        logging.basicConfig(level=level.upper(), format=f"%(asctime)s {name} %(levelname)s %(message)s")


def print_whole(table: Table, file: IO[str] | None = None) -> None:
    """Print a table with nothing cut off, however narrow the terminal is."""
    console = Console(file=file or sys.stdout)
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=10_000)).maximum)
    console.print(table)
