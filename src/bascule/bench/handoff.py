"""`bench handoff`: what moving KV between workers costs, beside what the machine can do at best."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Struct

from bascule.bench import second_token, transports
from bascule.bench.second_token import SecondTokenFigures, ServerPlan
from bascule.bench.transport_target import SEALED
from bascule.bench.transports import TransferFigures
from bascule.errors import ConfigError
from bascule.kv.transfer.select import TRANSPORTS
from bascule.models import load
from bascule.models.spec import ModelSpec
from bascule.types import KVLayout

_BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class HandoffSettings:
    """What is measured, and how often. Raises ConfigError for what cannot be."""

    model: str
    dtype: str
    size: int
    """Bytes of one transfer."""
    lengths: Sequence[int]
    """Prompt tokens; none: no server is started."""
    transports: Sequence[str]
    """Of the second token."""
    runs: int

    def __post_init__(self) -> None:
        if self.runs < 1 or self.size < 1:
            raise ConfigError(f"--runs is {self.runs} and --size {self.size} bytes, but both start at 1")
        if any(length < 1 for length in self.lengths):
            raise ConfigError(f"--prompt-tokens holds {min(self.lengths)}, but a prompt has at least 1 token")
        known = (*TRANSPORTS, SEALED)
        if unknown := [name for name in self.transports if name not in known]:
            raise ConfigError(f"{unknown[0]!r} is no transport; choose from {', '.join(known)}")


class HandoffReport(Struct, frozen=True, kw_only=True):
    model: str
    dtype: str
    bytes_per_transfer: int
    kv_bytes_per_token: int
    runs: int
    transports: list[TransferFigures]
    second_token: list[SecondTokenFigures]


def measure(settings: HandoffSettings) -> HandoffReport:
    """All figures; raises ModelError, and BenchFailed where something does not work."""
    spec = load(settings.model).spec
    layout = spec.kv_layout(settings.dtype, _BLOCK_SIZE)
    cores = sorted(os.sched_getaffinity(0))
    plan = _server_plan(settings, spec, layout, cores) if settings.lengths and settings.transports else None
    moved = transports.measure(layout, settings.size, settings.runs, cores)
    seconds: list[SecondTokenFigures] = []
    if plan is not None:
        seconds = second_token.measure(plan, settings.lengths, settings.transports, settings.runs)
    return HandoffReport(
        model=settings.model,
        dtype=settings.dtype,
        bytes_per_transfer=transports.blocks_for(layout, settings.size) * layout.block_bytes,
        kv_bytes_per_token=layout.planes * layout.token_bytes,
        runs=settings.runs,
        transports=moved,
        second_token=seconds,
    )


def _server_plan(settings: HandoffSettings, spec: ModelSpec, layout: KVLayout, cores: list[int]) -> ServerPlan:
    """Workers with KV memory for a few of the longest prompts; ConfigError for one beyond the model's context."""
    longest = max(settings.lengths)
    if longest + second_token.OUTPUT_TOKENS > spec.context:
        raise ConfigError(
            f"--prompt-tokens holds {longest}, but the model's context is {spec.context} tokens and "
            f"{second_token.OUTPUT_TOKENS} are for the output"
        )
    blocks = 4 * (longest // layout.block_size + 2)
    return ServerPlan(
        model=settings.model,
        cores=cores,
        flags=(
            f"--dtype={settings.dtype}",
            f"--block-size={layout.block_size}",
            f"--kv-memory={blocks * layout.block_bytes}",
        ),
        vocab=spec.vocab,
    )
