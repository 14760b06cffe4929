"""The process that `bascule profile` measures: an engine as a worker has it, told by lines which step to take."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

from bascule.bench.transport_target import send
from bascule.config import EngineConfig, HandoffConfig, HardwareConfig, ModelConfig, SloConfig, StoreConfig
from bascule.errors import BasculeError
from bascule.types import ModelCard, Role, WorkerId
from bascule.worker.parts import Parts
from bascule.worker.process import WorkerSettings, build, end_with_launcher, take_cores
from bascule.worker.profile import Cell, step_time

_MANY = 512
"""Tokens of a step that weights are read for in the form for large ones."""


class Plan(Struct, frozen=True, kw_only=True):
    """First line to the target: the worker that it is."""

    model: str
    device_kind: str
    device_index: int
    cores: tuple[int, ...]
    model_config: ModelConfig
    engine_config: EngineConfig
    parent: int


class Ready(Struct, frozen=True, tag=True, kw_only=True):
    """Its answer, once the model is loaded."""

    card: ModelCard
    blocks: int
    max_sequences: int
    chunk_tokens: int
    step_tokens: int
    weights: int
    """Bytes, in all forms that steps read."""
    resident: int
    """Bytes of memory, KV memory left out."""


class Failed(Struct, frozen=True, tag=True):
    """Instead of an answer: why this model cannot be had, or a step not be taken."""

    reason: str


class Took(Struct, frozen=True, tag=True, kw_only=True):
    """The answer to a `Cell`."""

    seconds: float
    resident: int


Answer = Ready | Failed | Took


def to_line(message: Struct) -> bytes:
    """One line."""
    return msgspec.json.encode(message, enc_hook=str) + b"\n"


def plan_of(line: bytes) -> Plan:
    """The first line."""
    return msgspec.json.decode(line, type=Plan, dec_hook=_path)


def _path(kind: type, value: Any) -> Any:
    return Path(value) if issubclass(kind, Path) else value


def _settings(plan: Plan) -> WorkerSettings:
    return WorkerSettings(
        model=plan.model,
        join="",
        worker=WorkerId("profile"),
        role=Role.MIXED,
        device_kind=plan.device_kind,
        device_index=plan.device_index,
        cores=plan.cores,
        device_name=plan.device_kind,
        host="127.0.0.1",
        model_config=plan.model_config,
        engine_config=plan.engine_config,
        handoff_config=HandoffConfig(),
        slo_config=SloConfig(),
        store_config=StoreConfig(),
        hardware_config=HardwareConfig(),
    )


def _ready(plan: Plan, parts: Parts) -> Ready:
    config = plan.engine_config
    bytes_read = getattr(parts.runner, "weight_bytes", lambda tokens: 0)  # a mock has no weights
    forms = {bytes_read(tokens) for tokens in (1, _MANY)}
    return Ready(
        card=parts.runner.card,
        blocks=parts.books.num_blocks,
        max_sequences=parts.max_sequences,
        chunk_tokens=parts.chunk_tokens,
        step_tokens=max(config.step_tokens, config.max_sequences),
        weights=sum(forms),
        resident=_resident(),
    )


def _resident() -> int:
    """Bytes, without memory that could be shared with other processes: the arena."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))


def main(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Serve the lines of `stdin` until it ends."""
    if not (line := stdin.readline()):
        return
    plan = plan_of(line)
    end_with_launcher(plan.parent)
    take_cores(plan.cores)
    try:
        parts = build(_settings(plan))
        send(stdout, _ready(plan, parts))
        while line := stdin.readline():
            seconds = step_time(parts.runner, msgspec.json.decode(line, type=Cell))
            send(stdout, Took(seconds=seconds, resident=_resident()))
    except BasculeError as error:
        send(stdout, Failed(str(error)))


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    main(sys.stdin.buffer, answers)
