"""Recorded traffic: when requests came, how long they were, what they shared; read, and made longer or faster.

Three forms are told apart by their content:

- Mooncake: a JSON object a line, with `timestamp` (ms), `input_length`, `output_length`, `hash_ids`.
- Azure: CSV with the columns `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`.
- Bascule's own decision log (`serve --decision-log`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from bascule.errors import ConfigError

BLOCK_TOKENS = 512
"""Prompt tokens that one of Mooncake's hash ids stands for."""
_Row = TypeVar("_Row")
_CSV_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceRequest(Struct, frozen=True):
    """One request of a trace."""

    at: float
    """Seconds after the trace's first request."""
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    """Names of the prompt's blocks, each of which stands for itself and all before it; none where a trace has none.
    The last block may be a partial one, or be left out."""
    block_tokens: int = BLOCK_TOKENS
    session: str = ""
    """The conversation it belongs to, where the trace says."""
    e2e_s: float | None = None
    """How long it took, where the trace says."""
    cached_tokens: int | None = None
    """Of the prompt, found in a cache, where the trace says."""


_Count = Annotated[int, Meta(ge=1, le=1 << 40)]
_Seconds = Annotated[float, Meta(ge=0)]


class _Mooncake(Struct):
    timestamp: _Seconds
    input_length: _Count
    output_length: _Count
    hash_ids: tuple[int, ...] = ()


class _Actual(Struct):
    output_tokens: Annotated[int, Meta(ge=0)]
    e2e_s: float | None = None
    cached_tokens: int | None = None


class _Decision(Struct):
    arrived: _Seconds
    prompt_tokens: _Count
    actual: _Actual
    session: str = ""
    blocks: tuple[str, ...] = ()


def read_trace(path: Path | str) -> list[TraceRequest]:
    """All requests of a file, by time.

    Raises ConfigError, which names the file and, where it can, the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the trace {path} is not text (byte {error.start})") from error
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ConfigError(f"the trace {path} is empty")
    if not first.lstrip().startswith("{"):
        found = _read(path, _csv_rows(path, lines), _azure)
    elif '"arrived"' in first:
        found = with_block_size(_read(path, _json_rows(lines), _decision), path)
    else:
        found = _read(path, _json_rows(lines), _mooncake)
    if not found:
        raise ConfigError(f"the trace {path} holds no requests")
    return _by_time(found)


def repeated(trace: Sequence[TraceRequest], times: int) -> list[TraceRequest]:
    """The trace `times` times, one after the other; what a repetition shares with another one it does not keep.

    Between two repetitions lies the mean gap of the trace.
    """
    if times < 1:
        raise ConfigError(f"a trace cannot be repeated {times} times; 1 is the trace as it is")
    names = 1 + max((name for request in trace for name in request.hash_ids), default=0)
    span = trace[-1].at * len(trace) / max(1, len(trace) - 1) if trace else 0.0
    return [
        msgspec.structs.replace(
            request,
            at=request.at + number * span,
            hash_ids=tuple(name + number * names for name in request.hash_ids),
            session=f"{request.session}+{number}" if request.session and number else request.session,
        )
        for number in range(times)
        for request in trace
    ]


def scaled(trace: Sequence[TraceRequest], speed: float) -> list[TraceRequest]:
    """The trace `speed` times as fast: requests come closer together and stay what they are."""
    if not (speed > 0 and math.isfinite(speed)):
        raise ConfigError(f"a speed of {speed:g} is not possible; 1 is the trace as it is, 2 is twice as fast")
    return [msgspec.structs.replace(request, at=request.at / speed) for request in trace]


def turned(trace: Sequence[TraceRequest], first: int) -> list[TraceRequest]:
    """The same, beginning with another request; what was before that comes behind the end."""
    start, span = trace[first].at, trace[-1].at + trace[-1].at / len(trace)
    later = [msgspec.structs.replace(request, at=request.at - start) for request in trace[first:]]
    return later + [msgspec.structs.replace(request, at=request.at - start + span) for request in trace[:first]]


def with_block_size(requests: list[TraceRequest], path: Path | str) -> list[TraceRequest]:
    """Requests of a decision log, with as many tokens a block as agree with all of them.

    A log names the full blocks of each prompt but its last token, and not their size. Of several sizes that agree the
    smallest power of two is taken, else the smallest.
    """
    least, most = 1, 1024
    named = [request for request in requests if request.hash_ids]
    for request in named:
        blocks = len(request.hash_ids)
        least = max(least, (request.prompt_tokens - 1) // (blocks + 1) + 1)
        most = min(most, (request.prompt_tokens - 1) // blocks)
    if not named:
        return requests
    if least > most:
        raise ConfigError(f"the decision log {path} was written with several block sizes; split it where they change")
    power = 1 << (least - 1).bit_length()
    size = power if power <= most else least
    return [msgspec.structs.replace(request, block_tokens=size) for request in requests]


def listed_requests(records: Iterable[object]) -> list[TraceRequest]:
    """Of decision records as `GET /admin/decisions` lists them, by time; those without a token are left out.

    Raises ConfigError for records of another form.
    """
    try:
        made = [decision_request(fields) for fields in records]
    except msgspec.ValidationError as error:
        raise ConfigError(f"these are no decision records of this version of Bascule: {error}") from error
    return _by_time([request for request in made if request is not None])


def decision_request(fields: object) -> TraceRequest | None:
    """A decision record, as the admin API and the decision log write it; None for one that got no token.

    Raises msgspec.ValidationError where a field is missing or wrong.
    """
    record = msgspec.convert(fields, _Decision)
    if not record.actual.output_tokens:
        return None
    return TraceRequest(
        at=record.arrived,
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.actual.output_tokens,
        hash_ids=tuple(int(name, 16) for name in record.blocks),
        session=record.session,
        e2e_s=record.actual.e2e_s,
        cached_tokens=record.actual.cached_tokens,
    )


def _by_time(requests: list[TraceRequest]) -> list[TraceRequest]:
    """Their times counted from the first one."""
    requests.sort(key=lambda request: request.at)
    return [msgspec.structs.replace(request, at=request.at - requests[0].at) for request in requests]


def _decision(line: str) -> TraceRequest | None:
    return decision_request(msgspec.json.decode(line))


def _mooncake(line: str) -> TraceRequest:
    row = msgspec.json.decode(line, type=_Mooncake)
    most = -(-row.input_length // BLOCK_TOKENS)
    if len(row.hash_ids) > most:
        raise ValueError(f"{len(row.hash_ids)} hash_ids for {row.input_length} tokens; {most} blocks of 512 hold them")
    if any(name < 0 for name in row.hash_ids):
        raise ValueError("hash_ids are whole numbers from 0 on")
    return TraceRequest(row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids)


def _azure(row: dict[str, str]) -> TraceRequest:
    when, prompt, output = (row[name] for name in _CSV_COLUMNS)
    prompt_tokens, output_tokens = int(prompt), int(output)
    if min(prompt_tokens, output_tokens) < 1:
        raise ValueError(f"{prompt} tokens in and {output} out; both are at least 1")
    at = datetime.fromisoformat(when.strip())
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return TraceRequest(at.timestamp(), prompt_tokens, output_tokens)


def _read(
    path: Path, rows: Iterable[tuple[int, _Row]], one: Callable[[_Row], TraceRequest | None]
) -> list[TraceRequest]:
    """What `one` makes of each row; what it raises is told with the row's line."""
    found = []
    for number, row in rows:
        try:
            request = one(row)
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(f"the trace {path}, line {number}: {error}") from error
        if request is not None:
            found.append(request)
    return found


def _json_rows(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _csv_rows(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    table = csv.reader(lines)
    head = [name.strip() for name in next((row for row in table if row), [])]
    if missing := [name for name in _CSV_COLUMNS if name not in head]:
        raise ConfigError(
            f"the trace {path}, line {table.line_num}: neither JSON lines nor a CSV header with "
            f"{', '.join(_CSV_COLUMNS)} (missing: {', '.join(missing)})"
        )
    for row in table:
        if not row:
            continue
        if len(row) != len(head):
            raise ConfigError(
                f"the trace {path}, line {table.line_num}: {len(row)} columns, the header has {len(head)}"
            )
        yield table.line_num, dict(zip(head, row, strict=True))
