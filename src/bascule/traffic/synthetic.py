"""Traffic made up in the likeness of a profile: the same lengths, burstiness and reuse, for as long as one wants."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random

import msgspec
from msgspec import Struct

from bascule.errors import ConfigError
from bascule.traffic.arrivals import Arrivals
from bascule.traffic.traces import BLOCK_TOKENS, TraceRequest, read_trace

_ROWS = 512
_LOOK = 64
"""Earlier requests that are looked at, on either side of the time at which a prompt's beginning was last used."""


class Row(Struct, frozen=True, array_like=True):
    """One request of the sample."""

    prompt_tokens: int
    output_tokens: int
    reused_tokens: int
    """Of the prompt's beginning, found in an earlier prompt."""
    since_s: float
    """How long before that one had come."""


class Synthetic(Struct, frozen=True, kw_only=True):
    """A generator: requests are drawn from a sample of real ones, with gaps of the same mean and variation."""

    rate: float
    """Requests/s."""
    burstiness: float
    """Coefficient of variation of the gaps."""
    block_tokens: int
    rows: tuple[Row, ...]

    def requests(self, count: int, seed: int, rate: float | None = None) -> list[TraceRequest]:
        """So many, by time; the same for the same seed. `rate` (requests/s): another one than the profile's own.

        Blocks are named only where some are used again.
        """
        draw = Random(f"{seed} rows")
        times = list(islice(Arrivals(rate or self.rate, self.burstiness).times(Random(f"{seed} times")), count))
        made: list[TraceRequest] = []
        fresh = 0
        if not any(row.reused_tokens for row in self.rows):
            rows = [draw.choice(self.rows) for _ in times]
            return [TraceRequest(at, row.prompt_tokens, row.output_tokens) for at, row in zip(times, rows, strict=True)]
        for at in times:
            row = draw.choice(self.rows)
            shared = self._shared(made, times, at, row)
            own = -(-row.prompt_tokens // self.block_tokens) - len(shared)
            names = (*shared, *range(fresh, fresh + own))
            fresh += own
            made.append(TraceRequest(at, row.prompt_tokens, row.output_tokens, names, self.block_tokens))
        return made

    def _shared(self, made: Sequence[TraceRequest], times: Sequence[float], at: float, row: Row) -> tuple[int, ...]:
        """The beginning of an earlier prompt, from about the time when it was last used; as long as asked if any is."""
        blocks = min(-(-row.reused_tokens // self.block_tokens), row.prompt_tokens // self.block_tokens)
        if not blocks or not made:
            return ()
        near = bisect_left(times, at - row.since_s, 0, len(made) - 1)
        best: tuple[int, ...] = ()
        for step in range(_LOOK):
            for number in {near - step, near + step}:
                if 0 <= number < len(made):
                    earlier = made[number]
                    full = earlier.hash_ids[: min(blocks, earlier.prompt_tokens // self.block_tokens)]
                    best = max(best, full, key=len)
            if len(best) == blocks:
                break
        return best


class _Profile(Struct):
    generator: Synthetic


def synthetic_of(
    trace: Sequence[TraceRequest], reused: Sequence[tuple[int, float]], rate: float, gap_cv: float | None
) -> Synthetic:
    """A generator like the trace, of which `reused` gives tokens and seconds for each request.

    The sample is of as many requests of each length as there are.
    """
    order = sorted(range(len(trace)), key=lambda number: (trace[number].prompt_tokens, number))
    wanted = min(_ROWS, len(order))
    picked = [order[(2 * place + 1) * len(order) // (2 * wanted)] for place in range(wanted)]
    return Synthetic(
        rate=rate if rate > 0 else 1.0,
        burstiness=gap_cv if gap_cv else 1.0,
        block_tokens=trace[0].block_tokens if trace else BLOCK_TOKENS,
        rows=tuple(Row(trace[n].prompt_tokens, trace[n].output_tokens, *reused[n]) for n in picked),
    )


def read_traffic(path: Path | str, count: int | None = None, seed: int = 1) -> list[TraceRequest]:
    """The requests of a trace, or as many made up in the likeness of a profile (`bascule traffic --json`).

    `count`: at most so many of a trace, exactly so many of a profile (its sample's number if it is None). Raises
    ConfigError.
    """
    generator = read_generator(Path(path))
    if generator is None:
        return read_trace(path)[:count]
    return generator.requests(count or len(generator.rows), seed)


def read_generator(path: Path) -> Synthetic | None:
    """A profile's; None for a file that is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    try:
        fields = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not isinstance(fields, dict) or "generator" not in fields:
        return None
    try:
        generator = msgspec.convert(fields, _Profile).generator
    except msgspec.ValidationError as error:
        raise ConfigError(f"the traffic profile {path} cannot be used: {error}") from error
    if not generator.rows or generator.block_tokens < 1 or any(row.prompt_tokens < 1 for row in generator.rows):
        raise ConfigError(f"the traffic profile {path} has no requests to draw from")
    return generator
