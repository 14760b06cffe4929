"""What a class of workers can do: steps of every kind measured in turns, and a cost model fitted to their medians."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from statistics import median
from typing import get_args

import msgspec
from msgspec import Struct

from bascule import __version__
from bascule.bench.profile_target import Answer, Failed, Plan, Ready, Took, to_line
from bascule.config import EngineConfig, ModelConfig
from bascule.errors import BasculeError, ConfigError
from bascule.hardware import (
    ClassFile,
    Conditions,
    ErrorFile,
    Hardware,
    Measured,
    MemoryFile,
    ProfileFile,
    StepFile,
    StepKind,
)
from bascule.policies.cost_fit import fit, predicted
from bascule.types import CostModel
from bascule.worker.profile import Cell, cpu_name, fits, sample_of

_ROUNDS, _QUICK_ROUNDS = 5, 3
_BRIEF_S = 0.05
"""A step that takes less is measured `_MORE` times a round."""
_MORE = 3
_LEAST_ROWS = 8
"""A step of fewer tokens takes about as long as one of so many, for the estimate of the time that is left."""
POOR_MEDIAN, POOR_WORST = 0.1, 0.3
"""Relative errors beyond which a fit is called poor, of the steps of one kind."""

Step = Callable[[Cell], float]
"""Takes a step; returns its seconds."""
Progress = Callable[[str, float, float], None]
"""Told what is measured, for how long it has been going, and for about how long it will (seconds)."""


class ClassPlan(Struct, frozen=True, kw_only=True):
    """One class of workers to be measured."""

    name: str
    model: str
    model_config: ModelConfig
    engine_config: EngineConfig
    device_kind: str
    device_index: int = 0
    cores: tuple[int, ...] = ()
    quick: bool = False


class MeasureFailed(BasculeError):
    """The process that is measured ended."""


def measure_class(plan: ClassPlan, progress: Progress, check: Callable[[Ready], None] = lambda _: None) -> Hardware:
    """Start an engine as a worker of that class does, in a process of its own, and measure it.

    `check` sees the model before anything is measured, and may raise. Raises ConfigError for what a worker could not
    be started with.
    """
    with ExitStack() as stack:
        target = _Target(plan, stack)
        progress(f"{plan.name}: loading the model", 0.0, 0.0)
        ready = target.ready()
        check(ready)
        cells = cells_of(ready, quick=plan.quick)
        rounds = _QUICK_ROUNDS if plan.quick else _ROUNDS
        taken = in_turns(cells, rounds, target.step, lambda *told: progress(f"{plan.name}: {told[0]}", *told[1:]))
        return _hardware(plan, ready, taken, target.resident)


def cells_of(ready: Ready, *, quick: bool) -> list[Cell]:
    """The steps that tell a class: prompts, prompts behind cached prefixes, streams, and prompts beside streams."""
    chunk = ready.chunk_tokens
    if quick:
        lengths, behinds, beside = [16, 64, 256], [(64, 1024), (chunk, 1024)], [(64, 4), (16, 16)]
        streams, contexts = [1, 4, 16, 32], [128, 1024]
    else:
        lengths = [16, 32, 64, 128, 256]
        behinds = [(new, behind) for behind in (256, 1024, 4096, 16384) for new in (64, chunk)]
        beside = [(64, 1), (16, 4), (64, 4), (256, 8), (64, 16), (256, 32)]
        streams, contexts = [1, 2, 4, 8, 16, 32, 64], [128, 1024, 4096]
    found = [Cell(new=new) for new in (*lengths, chunk)]
    found += [Cell(new=new, behind=behind) for new, behind in behinds]
    found += [Cell(streams=count, context=context) for context in contexts for count in streams]
    found += [Cell(new=new, streams=count, context=512) for new, count in beside]
    return [
        cell
        for cell in dict.fromkeys(found)
        if cell.new <= chunk
        and cell.rows <= ready.step_tokens
        and fits(cell, ready.card, ready.blocks, ready.max_sequences)
    ]


def in_turns(cells: Sequence[Cell], rounds: int, step: Step, progress: Progress) -> dict[Cell, list[float]]:
    """Seconds of each cell, `rounds` times in turns after once to warm up, every other time backwards, so that what
    comes and goes on the machine falls on all of them."""
    taken: dict[Cell, list[float]] = {cell: [] for cell in cells}
    latest: dict[Cell, float] = {}
    spent = 0.0
    for number in range(rounds + 1):
        turn = list(cells) if number % 2 else list(reversed(cells))
        for place, cell in enumerate(turn):
            left = _expected(turn[place:], latest) + (rounds - number) * _expected(cells, latest)
            progress(in_words(cell), spent, left)
            again = _MORE if number and latest[cell] < _BRIEF_S else 1
            found = [step(cell) for _ in range(again)]
            latest[cell] = median(found)
            spent += sum(found)
            if number:
                taken[cell] += found
    return taken


def _expected(cells: Iterable[Cell], latest: Mapping[Cell, float]) -> float:
    """Seconds that these will take about."""
    row_s = sum(latest.values()) / max(sum(map(_rows, latest)), 1)
    known = (latest.get(cell, row_s * _rows(cell)) for cell in cells)
    return sum(seconds * (_MORE if seconds < _BRIEF_S else 1) for seconds in known)


def _rows(cell: Cell) -> int:
    return max(cell.rows, _LEAST_ROWS)


def kind_of(cell: Cell) -> StepKind:
    """What of a model its time tells."""
    if not cell.new:
        return "decode"
    if cell.streams:
        return "mixed"
    return "cached prefix" if cell.behind else "prefill"


def in_words(cell: Cell) -> str:
    """For people."""
    streams = f"{cell.streams} stream{'s' * (cell.streams > 1)} of {cell.context:,} tokens"
    if not cell.new:
        return streams
    prompt = f"{cell.new:,} tokens of a prompt" + f" behind {cell.behind:,}" * bool(cell.behind)
    return prompt + f" beside {streams}" * bool(cell.streams)


def fitted(taken: Mapping[Cell, Sequence[float]]) -> tuple[CostModel, tuple[StepFile, ...]]:
    """The cost model that the medians speak for, and each step beside what the model says of it."""
    samples = [sample_of(cell, median(found)) for cell, found in taken.items()]
    cost = fit(samples, CostModel())
    steps = tuple(
        StepFile(
            kind=kind_of(cell),
            new=cell.new,
            behind=cell.behind,
            streams=cell.streams,
            context=cell.context if cell.streams else 0,
            runs=len(found),
            measured_s=median(found),
            least_s=min(found),
            most_s=max(found),
            fitted_s=float(says),
        )
        for (cell, found), says in zip(taken.items(), predicted(cost, samples), strict=True)
    )
    return cost, steps


def error_of(step: StepFile) -> float:
    """Of the fit, relative: above 0 where it says too much."""
    return step.fitted_s / step.measured_s - 1


def residuals(steps: Iterable[StepFile]) -> tuple[ErrorFile, ...]:
    """Of each kind of step."""
    kinds: defaultdict[StepKind, list[StepFile]] = defaultdict(list)
    for step in steps:
        kinds[step.kind].append(step)
    found = []
    for kind, some in kinds.items():
        worst = max(some, key=lambda step: abs(error_of(step)))
        found.append(
            ErrorFile(
                kind=kind,
                median=median(abs(error_of(step)) for step in some),
                worst=abs(error_of(worst)),
                worst_at=in_words(Cell(worst.new, worst.behind, worst.streams, worst.context)),
            )
        )
    return tuple(found)


def doubts(errors: Iterable[ErrorFile]) -> list[str]:
    """What to be warned of where the fit is poor."""
    errors = list(errors)
    measured = {error.kind for error in errors}
    found = [
        f"no {kind} step was measured, for want of KV memory; what such steps take is a guess. Give more --kv-memory"
        for kind in get_args(StepKind)
        if kind not in measured
    ]
    for error in errors:
        if error.median > POOR_MEDIAN or error.worst > POOR_WORST:
            found.append(
                f"the fit of {error.kind} steps is poor: off by {error.median:.0%} in the median, {error.worst:.0%} at "
                f"worst ({error.worst_at}); what is predicted of such steps is off by as much. If the machine was "
                "busy, measure again"
            )
    return found


def conditions() -> Conditions:
    """Of what has just been measured here."""
    return Conditions(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=f"{cpu_name() or os.uname().machine}, cores: {os.cpu_count()}",
        version=__version__,
        load=round(os.getloadavg()[0], 2),
    )


def _hardware(plan: ClassPlan, ready: Ready, taken: Mapping[Cell, Sequence[float]], resident: int) -> Hardware:
    layout = ready.card.layout
    cost, steps = fitted(taken)
    kv_token = layout.planes * layout.token_bytes
    measured = ProfileFile(
        conditions=conditions(),
        dtype=layout.dtype,
        memory=MemoryFile(
            weights=ready.weights,
            kv_token=kv_token,
            kv=ready.blocks * layout.block_bytes,
            at_start=ready.resident,
            under_load=resident,
        ),
        residuals=residuals(steps),
        steps=steps,
    )
    of_class = ClassFile(
        name=plan.name,
        cost=cost,
        model=ready.card.name,
        kv_tokens=ready.blocks * layout.block_size,
        kv_token_bytes=kv_token,
        chunk_tokens=ready.chunk_tokens,
        max_sequences=ready.max_sequences,
        device=plan.device_kind,
        cores=len(plan.cores) or None,
        memory_bytes=resident,
    )
    return Hardware(
        classes=(of_class,),
        model=ready.card.name,
        fingerprint=ready.card.fingerprint,
        measured=Measured(classes={plan.name: measured}),
    )


class _Target:
    """The process that is measured."""

    def __init__(self, plan: ClassPlan, stack: ExitStack) -> None:
        self.resident = 0
        """Bytes of its memory at most, KV memory left out."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bascule.bench.profile_target"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us, who end it
        )
        stack.callback(self._end)
        self._send(
            Plan(
                model=plan.model,
                device_kind=plan.device_kind,
                device_index=plan.device_index,
                cores=plan.cores,
                model_config=plan.model_config,
                engine_config=plan.engine_config,
                parent=os.getpid(),
            )
        )

    def ready(self) -> Ready:
        """Once the model is loaded; raises ConfigError where it cannot be."""
        answer = self._answer()
        assert isinstance(answer, Ready)
        self.resident = answer.resident
        return answer

    def step(self, cell: Cell) -> float:
        """Seconds of one step."""
        self._send(cell)
        answer = self._answer()
        assert isinstance(answer, Took)
        self.resident = max(self.resident, answer.resident)
        return answer.seconds

    def _send(self, message: Struct) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(to_line(message))
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self) -> Ready | Took:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: Answer = msgspec.json.decode(line, type=Answer)
        if isinstance(answer, Failed):
            raise ConfigError(answer.reason)
        return answer

    def _ended(self) -> MeasureFailed:
        return MeasureFailed(
            f"the engine's process ended (exit code {self._process.wait()}); its message, if it had one, is above"
        )

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.terminate()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
