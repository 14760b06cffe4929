"""`bascule models`: pull and list models."""

from __future__ import annotations

from cyclopts import App
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from bascule.models import catalog

app = App(name="models", help="Pull models, and list those on this machine.")


@app.command
def pull(name: str = "smollm2") -> None:
    """Download a model and check it; does nothing if it is there and whole.

    Example: bascule models pull smollm2

    Parameters
    ----------
    name
        A name from `bascule models list`.
    """
    Console(stderr=True).print(f"{name}: {pull_with_progress(name)}")


@app.command(name="list")
def list_models() -> None:
    """Show the models that can be pulled, and which are on this machine.

    Example: bascule models list
    """
    table = Table("name", "state", "size", "path")
    for entry in catalog.installed():
        table.add_row(entry.name, entry.state, f"{entry.bytes / 1e6:.0f} MB" if entry.bytes else "", str(entry.path))
    Console().print(table)


def pull_with_progress(name: str) -> str:
    """Pull a model of the catalogue with a progress bar on standard error; returns its path."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"pulling {name}", total=None)
        return str(catalog.pull(name, lambda done, total: bar.update(task, completed=done, total=total)))
