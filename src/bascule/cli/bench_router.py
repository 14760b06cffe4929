"""`bascule bench router`: how long a routing decision takes with so many workers and blocks, and how that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bascule.bench.growth_plot import growth_plot
from bascule.bench.router import RouterSettings, growth, measure
from bascule.cli.report import JsonTarget, write_json
from bascule.errors import ConfigError


def router(
    *,
    workers: int = 1000,
    blocks: int = 1_000_000,
    prompt_blocks: int = 100,
    decisions: int = 2000,
    json: JsonTarget = None,
    plot: str | None = None,
    grow: bool = True,
) -> None:
    """Measure routing decisions over a busy cluster that is only there as the router's own state.

    A decision hashes the prompt's blocks, looks up who has them, prices the placements, and counts the one it takes.

    Example: bascule bench router --json router.json --plot router.svg

    Parameters
    ----------
    workers
        Workers in the cluster.
    blocks
        Different blocks that they have cached together.
    prompt_blocks
        Length of each prompt, in blocks.
    decisions
        Decisions that are timed.
    json
        File to write the figures to, `-` for standard output.
    plot
        File (.svg or .html) to draw the growth to.
    grow
        Measure smaller clusters too, for the growth.
    """
    for name, value in (("--workers", workers), ("--blocks", blocks), ("--prompt-blocks", prompt_blocks)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if decisions < 10:
        raise ConfigError(f"--decisions is {decisions}; fewer than 10 say nothing")
    if plot is not None and (Path(plot).suffix not in (".svg", ".html") or not grow):
        raise ConfigError(
            f"--plot {plot}: the name must end in .svg or .html, and the growth is drawn, so not --no-grow"
        )
    settings = RouterSettings(workers=workers, blocks=blocks, prompt_blocks=prompt_blocks, decisions=decisions)
    report = measure(settings)
    report["growth"] = growth(settings) if grow else []
    if json != "-":
        _show(report)
    if plot is not None:
        try:
            Path(plot).write_text(growth_plot(report["growth"], html=plot.endswith(".html")))
        except OSError as error:
            raise ConfigError(f"cannot write the plot to {plot}: {error}") from error
    write_json(report, json)


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"prompts of {report['prompt_blocks']} blocks", title_justify="left")
    for name in ("workers", "blocks", "decision p50 (ms)", "p99", "CPU p50 (ms)", "p99"):
        table.add_column(name, justify="right")
    for each in [*report["growth"], report]:
        times = [each[key][which] for key in ("decision_s", "decision_cpu_s") for which in ("p50", "p99")]
        table.add_row(f"{each['workers']:,}", f"{each['blocks']:,}", *(f"{1000 * seconds:.2f}" for seconds in times))
    parts = ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in report["parts_s"].items())
    console = Console()
    console.print(table)
    console.print(f"parts, in µs: {parts}")
    console.print(
        f"{report['events_per_s']:,.0f} block events/s, {report['bytes_per_block']:.0f} bytes a block in the index"
    )
