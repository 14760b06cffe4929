"""`bascule profile`: what workers of a class can do here, measured, and written to the hardware file."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bascule.bench.profile import ClassPlan, doubts, error_of, measure_class
from bascule.bench.profile_target import Ready
from bascule.cli.models import pull_with_progress
from bascule.cli.report import JsonTarget, write_json
from bascule.cli.screen import print_whole
from bascule.cli.worker import Flat
from bascule.config import EngineConfig, ModelConfig
from bascule.control.devices import parse_device
from bascule.errors import ConfigError
from bascule.hardware import ClassFile, Hardware, ProfileFile, StepFile, add_to_file, read_hardware
from bascule.models.catalog import CATALOG

_BUSY = 0.5
"""Processes that want to run, for each core, from which on it is said that others are measured too."""


def profile(
    model: str = "smollm2",
    /,
    *,
    cores: str | None = None,
    device: str = "cpu",
    name: str | None = None,
    quick: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
    json: JsonTarget = None,
    model_config: Annotated[ModelConfig, Flat] = ModelConfig(),
    engine_config: Annotated[EngineConfig, Flat] = EngineConfig(),
    config: Path | None = None,
) -> None:
    """Measure what steps of a worker take, fit the cost model to them, and say how well it fits.

    The engine is started as a worker starts it, in a process of its own. Every step is measured several times, in turns
    with all others; medians count. Nothing is written before all is measured. `serve`, `simulate` and `plan` read the
    file (--hardware); `bascule probe` adds the links.

    Example: bascule profile smollm2 --cores 1,2 --out hw.json

    Parameters
    ----------
    model
        `smollm2`, a directory in Hugging Face format, a GGUF file or a hub id.
    cores
        Cores of a worker; several numbers with commas between measure a class each (default: all cores).
    device
        cpu, cuda or cuda:N.
    name
        What the class is to be called; with several, the number of cores is added (default: cpu-1, cpu-2, ..., or
        cuda).
    quick
        Fewer steps, fewer times: about a fifth of the time, and a rougher model.
    out
        Hardware file to write, or to add to.
    json
        File to write what was measured to, `-` for standard output.
    config
        TOML file with the keys of the model and the engine.
    """
    plans = _plans(model, cores, device, name, quick, model_config, engine_config)
    before = read_hardware(out) if out is not None and out.exists() else None
    if out is not None and not os.access(out.parent, os.W_OK):  # a new file takes its place
        raise ConfigError(f"--out {out} cannot be written; give a file in a directory that is there and yours")

    def check(ready: Ready) -> None:
        if before is not None and out is not None:
            before.require_model(ready.card.name, ready.card.fingerprint, out)

    if (load := os.getloadavg()[0]) > _BUSY * (os.cpu_count() or 1):
        print(f"warning: this machine is busy (load {load:.1f}), and what is measured will be too", file=sys.stderr)
    if model in CATALOG:
        pull_with_progress(model)
    found = Hardware()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task("", total=None, left="")

        def told(what: str, spent: float, left: float) -> None:
            total = spent + left or None
            bar.update(shown, description=what, completed=spent, total=total, left=_about(left) if spent else "")

        for plan in plans:
            bar.reset(shown, left="")
            found = found.adding(measure_class(plan, told, check), out or Path("what was measured before"))
    if json != "-":
        for one in found.classes:
            _show(one, found.measured.classes[str(one.name)])
    write_json(found, json)
    if out is not None:
        whole = add_to_file(out, found)
        if json != "-":
            _say(f"{out} has the classes {', '.join(whole.names)}, and {len(whole.links)} links")


def _plans(
    model: str,
    cores: str | None,
    device: str,
    name: str | None,
    quick: bool,
    model_config: ModelConfig,
    engine_config: EngineConfig,
) -> list[ClassPlan]:
    """A class for each number of cores, or for the device; raises ConfigError for what is not here."""
    place = parse_device(device)
    if place.kind != "cpu" and cores is not None:
        raise ConfigError(f"--cores is for workers on a CPU; leave it out with --device {device}")
    usable = place.cores
    if name == "":
        raise ConfigError("--name is empty; give the class a name, or leave it out")
    numbers = [len(usable)] if cores is None else _numbers(cores, len(usable))
    found = []
    for number in numbers:
        own = f"cpu-{number}" if place.kind == "cpu" else place.kind
        if name is not None:
            own = name if len(numbers) == 1 else f"{name}-{number}"
        found.append(
            ClassPlan(
                name=own,
                model=model,
                model_config=model_config,
                engine_config=engine_config,
                device_kind=place.kind,
                device_index=place.index,
                cores=usable[:number],
                quick=quick,
            )
        )
    return found


def _numbers(text: str, most: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= most for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(
            f"--cores {text!r}: give numbers of cores from 1 to {most}, which this process may use, each once and with "
            "commas between, such as 1,2"
        )
    return [int(part) for part in parts]


def _about(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


def _show(one: ClassFile, measured: ProfileFile) -> None:
    """One class: its steps, its memory, and how well the model fits."""
    kinds: defaultdict[str, list[StepFile]] = defaultdict(list)
    for step in measured.steps:
        kinds[step.kind].append(step)
    table = Table(
        title=f"{one.name}: {one.model} in {measured.dtype} on {measured.conditions.machine}; load "
        f"{measured.conditions.load}, medians in ms",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("step")
    for heading in ("new", "behind", "streams", "context", "runs", "measured", "least", "most", "fitted", "off by"):
        table.add_column(heading, justify="right")
    for steps in kinds.values():
        _rows(table, steps)
        table.add_section()
    print_whole(table)
    memory, cost = measured.memory, one.cost
    _say(
        f"memory: weights {memory.weights / 1e6:,.0f} MB, KV {memory.kv_token:,} bytes a token ({one.kv_tokens:,} "
        f"tokens in {memory.kv / 1e6:,.0f} MB); beside KV the process has {memory.at_start / 1e6:,.0f} MB at its "
        f"start and {memory.under_load / 1e6:,.0f} MB under load"
    )
    _say(
        f"fitted: a step {cost.step_s * 1e3:.3g} ms, a token {cost.token_s * 1e3:.3g} ms, a million pairs "
        f"{cost.pair_s * 1e9:.3g} ms, a thousand tokens of context {cost.context_s * 1e6:.3g} ms, a draw "
        f"{cost.draw_s * 1e3:.3g} ms; 1, 2, 4, ... streams alone "
        f"{', '.join(f'{seconds * 1e3:.3g}' for seconds in cost.stream_s)} ms"
    )
    for error in measured.residuals:
        _say(f"  {error.kind}: off by {error.median:.1%} in the median, {error.worst:.1%} at worst ({error.worst_at})")
    for doubt in doubts(measured.residuals):
        _say(f"warning: {doubt}")
    _say("")


def _rows(table: Table, steps: Iterable[StepFile]) -> None:
    for step in steps:
        counts = (f"{count:,}" if count else "" for count in (step.new, step.behind, step.streams, step.context))
        times = (f"{1e3 * seconds:,.1f}" for seconds in (step.measured_s, step.least_s, step.most_s, step.fitted_s))
        table.add_row(step.kind, *counts, str(step.runs), *times, f"{error_of(step):+.1%}")


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
