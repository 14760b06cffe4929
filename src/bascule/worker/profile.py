"""What steps cost on this device, measured over the runner before a worker registers, and kept for its next start."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
from blake3 import blake3
from msgspec import Struct

from bascule import __version__
from bascule.engine.protocol import Runner, Slice
from bascule.errors import UNREADABLE
from bascule.machine import cache_home
from bascule.policies.cost_fit import StepSample, fit, predicted, step_sample
from bascule.types import CostModel, ModelCard, SamplingParams

logger = logging.getLogger(__name__)

BUDGET_S = 1.2
"""Seconds that a profile takes at most, steps that it cannot do without aside."""
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
_CHEAP = 5
"""A step that takes no more than the budget by this is measured again."""


class Cell(Struct, frozen=True):
    """One step to be measured: a prefill part (none if `new` is 0) beside streams of `context` tokens each."""

    new: int = 0
    behind: int = 0
    streams: int = 0
    context: int = 16

    @property
    def rows(self) -> int:
        return self.new + self.streams

    def tokens(self, block_size: int) -> int:
        """Tokens of KV memory that it takes, each sequence in blocks of its own."""
        sequences = [self.new + self.behind] + [self.context] * self.streams
        return sum(-(-tokens // block_size) * block_size for tokens in sequences)


NEEDED = (Cell(streams=1), Cell(new=64), Cell(streams=8), Cell(new=64, behind=1024))
"""Without these a model would know nothing of streams, of prompts, of how streams add up, or of long prompts."""
CHECKED = NEEDED[:2]
"""By these a kept model is still true, or of a busy hour, or of another machine whose processor has the same name."""
_ALIKE = 1.25
"""Ratio up to which a step takes what was kept."""
_TRIES = 3
OTHERS = (
    Cell(streams=2),
    Cell(streams=4),
    Cell(streams=16),
    Cell(streams=2, context=1024),
    Cell(new=16, behind=16),
    Cell(new=32, streams=8),
    Cell(streams=32),
    Cell(new=16, streams=16),
    Cell(new=256),
)


def measure(
    runner: Runner,
    num_blocks: int,
    max_sequences: int,
    budget_s: float,
    now: Callable[[], float] = time.perf_counter,
) -> list[StepSample]:
    """Each cell at its fastest, for whatever else runs on this machine only ever makes it slower.

    The steps are over the first blocks of the arena that `runner` is bound to, of which none may be in use. Nothing of
    this enters the books; whoever leases the blocks later writes before reading, as ever.
    """
    card = runner.card
    cells = _cells(card, num_blocks, max_sequences)
    begin = now()
    taken: dict[Cell, float] = {}

    def run(cell: Cell) -> None:
        taken[cell] = min(step_time(runner, cell, now), taken.get(cell, math.inf))

    for cell in cells[:2]:
        step_time(runner, cell)  # what only a first call pays: memory that is touched, scratch that grows
    for cell in cells:
        a_row = min((taken[done] / done.rows for done in taken), default=0.0)
        if cell in NEEDED or now() - begin + cell.rows * a_row < budget_s:
            run(cell)
    for cell in _again(taken, budget_s):
        if now() - begin + taken[cell] > budget_s:
            break
        run(cell)
    return [sample_of(cell, seconds) for cell, seconds in taken.items()]


def step_time(runner: Runner, cell: Cell, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one step of `runner`, over the first blocks of its arena."""
    batch = _batch(cell, runner.card)
    started = now()
    runner.execute(batch)
    return now() - started


def profiled(
    runner: Runner, how: str, num_blocks: int, max_sequences: int, now: Callable[[], float] = time.perf_counter
) -> CostModel:
    """What steps of `runner` cost: as kept, if a few steps still say so, else measured (see `measure`), and kept if
    that had the time it needs.

    `how` names what else decides it: the device, the threads, the form of the weights.
    """
    card = runner.card
    path = _kept_at(f"{__version__} {card.fingerprint} {card.layout} {how} {num_blocks} {max_sequences}")
    if path is not None and (kept := _read(path)) is not None:
        if _holds(kept, runner, [cell for cell in CHECKED if fits(cell, card, num_blocks, max_sequences)], now):
            return kept
        logger.info("steps do not take here and now what %s says; measuring again", path)
    begin = now()
    samples = measure(runner, num_blocks, max_sequences, BUDGET_S, now)
    cost = fit(samples, CostModel())
    logger.info("measured what steps cost in %.1f s: %s", now() - begin, cost)
    # One that was cut short comes from a slow device, or from a machine that was busy with something else.
    if path is not None and len(samples) == len(_cells(card, num_blocks, max_sequences)):
        _write(path, cost)
    return cost


def _holds(kept: CostModel, runner: Runner, cells: list[Cell], now: Callable[[], float]) -> bool:
    """Whether steps take what `kept` says, at their fastest."""
    for cell in cells:
        step_time(runner, cell)  # a first call pays more
        fastest = sample_of(cell, min(step_time(runner, cell, now) for _ in range(_TRIES)))
        if not 1 / _ALIKE <= float(predicted(kept, [fastest])[0]) / fastest.seconds <= _ALIKE:
            return False
    return True


def cpu_name() -> str:
    """The processor's name by the kernel; empty where there is no /proc/cpuinfo."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return ""


def _cells(card: ModelCard, num_blocks: int, max_sequences: int) -> list[Cell]:
    return [cell for cell in (*NEEDED, *OTHERS) if fits(cell, card, num_blocks, max_sequences)]


def fits(cell: Cell, card: ModelCard, num_blocks: int, max_sequences: int) -> bool:
    """Whether a worker with so much memory could have that step."""
    size = card.layout.block_size
    longest = max(cell.new + cell.behind, cell.context * bool(cell.streams))
    return longest <= card.context and cell.streams <= max_sequences and cell.tokens(size) <= num_blocks * size


def sample_of(cell: Cell, seconds: float) -> StepSample:
    """As the fit takes it."""
    prefill = [(cell.behind, cell.new)] if cell.new else []
    return step_sample([*prefill, *[(cell.context - 1, 1)] * cell.streams], seconds)


def _batch(cell: Cell, card: ModelCard) -> list[Slice]:
    size, vocab = card.layout.block_size, card.vocab
    taken = 0

    def blocks(tokens: int) -> range:
        nonlocal taken
        first, taken = taken, taken - (-tokens // size)
        return range(first, taken)

    def ids(count: int) -> list[int]:
        return [1 + 7 * index % (vocab - 1) for index in range(count)]

    batch = [Slice(ids(cell.new), cell.behind, blocks(cell.behind + cell.new))] if cell.new else []
    for _ in range(cell.streams):
        history = ids(cell.context)
        batch.append(Slice(history[-1:], cell.context - 1, blocks(cell.context), _GREEDY, history, 1))
    return batch


def _again(taken: dict[Cell, float], budget_s: float) -> Iterator[Cell]:
    """The cells that cost little, the least first, in turns without end."""
    cheap = [cell for cell, seconds in taken.items() if seconds < budget_s / _CHEAP]
    cheap.sort(key=taken.__getitem__)
    while cheap:
        yield from cheap


def _kept_at(identity: str) -> Path | None:
    try:
        return cache_home() / "costs" / f"{blake3(identity.encode()).hexdigest(16)}.json"
    except RuntimeError:  # there is no home directory
        return None


def _read(path: Path) -> CostModel | None:
    """What is kept; None if it is absent or is to be measured again."""
    try:
        cost = msgspec.json.decode(path.read_bytes(), type=CostModel)
    except FileNotFoundError:
        return None
    except (OSError, *UNREADABLE) as error:
        logger.warning("%s cannot be used (%s) and will be measured again", path, error)
        return None
    return cost if any(cost.stream_s) else None


def _write(path: Path, cost: CostModel) -> None:
    """Keep `cost`, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            file.write(msgspec.json.encode(cost))
        os.replace(file.name, path)
    except OSError as error:
        logger.info("the cost model is not kept in %s: %s", path.parent, error)
