"""`bascule plan`: what to build for given traffic, SLO and budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bascule.analytic.catalogue import Catalogue, load_catalogue
from bascule.analytic.predictor import Predictor, load_calibration
from bascule.cli.plan_view import show
from bascule.cli.report import JsonTarget, write_json
from bascule.cli.worker import Flat
from bascule.config import SloConfig, parse_size
from bascule.errors import ConfigError
from bascule.hardware import Hardware, read_class, read_hardware
from bascule.planning.answer import answer
from bascule.planning.candidates import ARCHITECTURES, Budget
from bascule.planning.classes import WorkerClass, catalogue_classes, measured_class
from bascule.planning.demand import demand_of
from bascule.planning.fluid import Links
from bascule.planning.report import report_of
from bascule.planning.search import Ask, Objective
from bascule.planning.trial import Setting
from bascule.sim.classes import Memory

_BETWEEN, _WITHIN, _MACHINE = 12.5e9, 4e9, 8
"""Links and devices of a machine where neither flags, file nor catalogue say anything."""
_SIMULATIONS, _AROUND = 40, 90
"""About how many there are of a search, and of a look around; the bar is stretched where there are more."""


def recommend(
    *,
    workload: str | None = None,
    trace: Path | None = None,
    rate: float | None = None,
    concurrency: int | None = None,
    speed: float = 1.0,
    slo: Annotated[SloConfig, Flat] = SloConfig(),
    attainment: float = 0.9,
    devices: int | None = None,
    budget: float | None = None,
    objective: Objective = "cost",
    architectures: str = ",".join(ARCHITECTURES),
    cost_model: Path | None = None,
    pool_class: tuple[str, ...] = (),
    hardware: str | None = None,
    model: str | None = None,
    tp: str | None = None,
    framework: Literal["trtllm", "vllm", "sglang"] = "vllm",
    weights: str = "bf16",
    catalogue: Path | None = None,
    calibration: Path | None = None,
    kv_memory: str = "1GiB",
    kv_token_bytes: int = 23_040,
    link: str | None = None,
    local_link: str | None = None,
    machine_devices: int | None = None,
    requests: int = 0,
    seeds: int = 3,
    first_seed: int = 1,
    quick: bool = False,
    json: JsonTarget = None,
) -> None:
    """Say what to build for this traffic, SLO and budget: architecture, workers, cost, and what else was looked at.

    Exit code 2 where nothing that the budget holds keeps the SLO; what comes nearest is told all the same.

    Example: bascule plan --workload mixed --concurrency 8 --devices 2 --cost-model core.json

    Example: bascule plan --trace trace.jsonl --budget 30 --hardware h100_sxm,a100 --model meta-llama/Llama-3.1-8B

    Parameters
    ----------
    workload
        One of chat, summarise, mixed, shared-prefix, multi-turn; with --rate or --concurrency.
    trace
        Recorded traffic (Mooncake JSONL, Azure CSV, a decision log of `serve`), or what `bascule traffic --json`
        writes; at its own rate unless one is given.
    rate
        Requests per second, Poisson arrivals unless a trace has others.
    concurrency
        Clients, each of which waits for its answer before it asks again.
    speed
        Take a trace so many times as fast.
    attainment
        Share of requests that has to be within all three bounds.
    devices
        Most GPUs or cores.
    budget
        Most money an hour, by the prices of the classes.
    objective
        cost: the cheapest that keeps the SLO; goodput: the most requests/s within the SLO that the budget holds.
    architectures
        Those that may be taken, with commas between.
    cost_model
        JSON file with a cost model, a class of workers, or several (`bascule profile`).
    pool_class
        A class by a name, NAME=FILE, or NAME=DEVICESxFILE where a worker takes several devices. May be repeated.
    hardware
        Names in the catalogue with commas between (needs --model), or hardware files.
    model
        Model that is served; of catalogue hardware its shape decides.
    tp
        GPUs of a catalogue worker, several numbers with commas between (default: the fewest that hold the model, and
        twice those).
    framework
        trtllm, vllm or sglang: by whose measured efficiencies catalogue hardware is judged.
    weights
        bf16, fp8, fp8_block, nvfp4, int4_wo or int8_wo, on catalogue hardware.
    catalogue
        JSON with hardware, prices and models beside, or instead of, the shipped ones.
    calibration
        What `bascule plan calibrate` has written.
    kv_memory
        Memory for KV blocks of a worker whose file does not say.
    kv_token_bytes
        Bytes of KV of one token, where files do not say.
    link
        Bytes per second from machine to machine, each way.
    local_link
        Bytes per second within a machine.
    machine_devices
        Devices of a machine.
    requests
        Requests of each simulation (default: by the load, 80 to 360).
    seeds
        Simulations of each of the last candidates.
    first_seed
        Of the requests.
    quick
        Leave out crossover, sensitivity and largest rate.
    json
        File to write the answer to, `-` for standard output.
    """
    _check(workload, trace, rate, concurrency, devices, budget, attainment, seeds, requests, speed)
    memory = Memory(kv_bytes=parse_size(kv_memory, "kv-memory"), kv_token_bytes=kv_token_bytes)
    known = load_catalogue(catalogue)
    read = _Read(memory)
    if cost_model is not None:
        read.file(cost_model)
    for text in pool_class:
        read.named(text)
    for name in (hardware or "").split(","):
        if name.endswith(".json") or (name and Path(name).exists()):
            read.file(Path(name))
    names = [name for name in (hardware or "").split(",") if name and str(Path(name)) not in read.files]
    if names:
        if model is None:
            raise ConfigError(f"--hardware {','.join(names)} needs --model, a name in the catalogue")
        predictor = Predictor(load_calibration(calibration))
        read.classes += catalogue_classes(names, model, _ways(tp), framework, weights, known, predictor)
    classes = read.checked(model, known, budget)
    ask = Ask(
        classes=classes,
        budget=Budget(devices=devices, per_hour=budget),
        setting=Setting(
            demand=demand_of(workload, trace, rate, concurrency, speed),
            slo=slo.slo,
            links=_links(read, known, classes, link, local_link, machine_devices),
            requests=requests,
        ),
        attainment=attainment,
        objective=objective,
        architectures=_architectures(architectures),
        seeds=tuple(range(first_seed, first_seed + seeds)),
    )
    served = model or next((one.model for one in classes if one.model), None) or "smollm2"
    with _Bar(_SIMULATIONS if quick else _SIMULATIONS + _AROUND) as bar:
        found = answer(ask, served, bar.heard, around=not quick)
    if json != "-":
        show(found)
    write_json(report_of(found), json)
    if found.short is not None:
        raise ConfigError(found.short)


@dataclass
class _Read:
    """Classes of workers as they are given."""

    memory: Memory
    classes: list[WorkerClass] = field(default_factory=list)
    files: dict[str, Hardware] = field(default_factory=dict)

    def file(self, path: Path) -> None:
        """All classes of a file, and its links."""
        found = self.files[str(path)] = read_hardware(path)
        self.classes += [measured_class(one.name or path.stem, None, one, self.memory) for one in found.classes]

    def named(self, text: str) -> None:
        """NAME=FILE or NAME=DEVICESxFILE."""
        name, _, given = text.partition("=")
        count, times, rest = given.partition("x")
        several = bool(times) and count.isdecimal() and not Path(given).exists()
        if not name or not given or (several and (not int(count) or not rest)):
            raise ConfigError(f"--pool-class {text!r} is not NAME=FILE, nor NAME=DEVICESxFILE with a number from 1 on")
        path = Path(rest if several else given)
        self.classes.append(measured_class(name, int(count) if several else None, read_class(path), self.memory))

    def checked(self, model: str | None, catalogue: Catalogue, budget: float | None) -> tuple[WorkerClass, ...]:
        """All classes, if they go together."""
        if not self.classes:
            raise ConfigError(
                "nothing to build from: give --cost-model FILE or --pool-class NAME=FILE (`bascule profile` measures a "
                "class, `serve` keeps its own in ~/.cache/bascule/costs), or --hardware with names of the catalogue "
                f"({', '.join(catalogue.hardware)}) and --model"
            )
        names = [one.name for one in self.classes]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two classes are called {repeated[0]!r}; name them by --pool-class NAME=FILE")
        wanted = model or next((one.model for one in self.classes if one.model), None)
        for one in self.classes:
            if wanted and one.model and catalogue.resolve(one.model) != catalogue.resolve(wanted):
                raise ConfigError(
                    f"class {one.name} is a cost model of {one.model}, and {wanted} is to be served; measure that one "
                    "(`bascule profile`), or leave the class out"
                )
            if budget is not None and one.price_per_hour is None:
                raise ConfigError(
                    f"class {one.name} has no price, and --budget is in money; write price_per_hour into its file, or "
                    "give --devices"
                )
        if len({one.kv_token_bytes for one in self.classes}) > 1:
            told = ", ".join(f"{one.name} {one.kv_token_bytes}" for one in self.classes)
            raise ConfigError(f"bytes of KV of a token differ ({told}); workers that hand over need the same")
        return tuple(self.classes)


class _Bar:
    """How many simulations have been run, and what they are for."""

    def __init__(self, about: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("planning", total=about)
        self._about = about
        self._count = 0

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def heard(self, why: str) -> None:
        self._count += 1
        total = max(self._about, self._count + 1)
        self._bar.update(self._task, completed=self._count, total=total, description=why)


def _check(
    workload: str | None,
    trace: Path | None,
    rate: float | None,
    concurrency: int | None,
    devices: int | None,
    budget: float | None,
    attainment: float,
    seeds: int,
    requests: int,
    speed: float,
) -> None:
    """Raises ConfigError for what cannot be meant."""
    if (workload is None) == (trace is None):
        raise ConfigError("give the traffic: either --workload NAME or --trace FILE")
    if rate is not None and concurrency is not None:
        raise ConfigError("--rate and --concurrency exclude each other: arrivals of their own, or clients that wait")
    if workload is not None and rate is None and concurrency is None:
        raise ConfigError("how much of the workload comes? Give --rate (requests/s) or --concurrency (clients)")
    if devices is None and budget is None:
        raise ConfigError("give a budget: --devices N, or --budget in money an hour, or both")
    positive = {
        "rate": rate,
        "concurrency": concurrency,
        "devices": devices,
        "budget": budget,
        "speed": speed,
        "seeds": seeds,
    }
    for name, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} is {value:g}; it must be above 0")
    if not 0 < attainment <= 1:
        raise ConfigError(f"--attainment is {attainment:g}; it is a share of requests, such as 0.9")
    if requests < 0:
        raise ConfigError(f"--requests is {requests}; give 0 for as many as the load asks for, or more")


def _ways(text: str | None) -> list[int]:
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--tp {text!r} is not a number of GPUs, nor several with commas between")
    return [int(part) for part in parts]


def _architectures(text: str) -> tuple[str, ...]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise ConfigError(f"architecture {unknown[0]!r} is not known; there are {', '.join(ARCHITECTURES)}")
    return tuple(name for name in ARCHITECTURES if name in names)


def _links(
    read: _Read,
    catalogue: Catalogue,
    classes: Sequence[WorkerClass],
    link: str | None,
    local_link: str | None,
    machine_devices: int | None,
) -> Links:
    """By flags, else by hardware files, else by the catalogue (a machine has its GPUs' network cards together)."""
    if machine_devices is not None and machine_devices < 1:
        raise ConfigError(f"--machine-devices is {machine_devices}; it must be above 0")
    listed = [catalogue.hardware[one.hardware] for one in classes if one.hardware in catalogue.hardware]
    devices = machine_devices or min((one.node for one in listed), default=_MACHINE)

    def rate(text: str | None, flag: str, same_machine: bool, of_catalogue: Iterator[float], usual: float) -> float:
        if text is not None:
            found: float = parse_size(text, flag)
            if not found:
                raise ConfigError(f"--{flag} is {text}; it must be above 0")
            return found
        measured = (each.typical(same_machine=same_machine) for each in read.files.values())
        known = [each.bytes_per_s for each in measured if each is not None]
        return min(known) if known else min(of_catalogue, default=usual)

    cards = (devices * one.nic_gbit_s * 1e9 / 8 for one in listed)
    return Links(
        between=rate(link, "link", False, cards, _BETWEEN),
        within=rate(local_link, "local-link", True, (one.link_gb_s * 1e9 for one in listed), _WITHIN),
        machine_devices=devices,
    )
