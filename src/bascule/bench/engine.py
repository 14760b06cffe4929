"""What a step of the engine costs beside what this machine could do at best, measured in the same run in turns."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import psutil
from msgspec import Struct, field

from bascule.engine.protocol import Slice
from bascule.engine.torch.limits import Limits, device_name, free_bytes
from bascule.engine.torch.runner import TorchRunner
from bascule.errors import ConfigError
from bascule.kv.arena import Arena
from bascule.models.source import ModelSource
from bascule.models.spec import ModelSpec
from bascule.types import SamplingParams
from bascule.worker.profile import cpu_name

_BLOCK = 16
_GEMM_ROWS = 512
"""Rows at which the GEMM rate is measured in any case: enough for torch's products to be at their best."""
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
Form = Literal["bf16", "int4"]


class DecodeCell(Struct, kw_only=True):
    """One decode step; `limit_s` is the time to read what it must read at the measured rate, and `ratio` its share.

    `compute_limit_s` is the time that its matrix products would take at the measured GEMM rate: where it is the larger
    of the two, memory is not what limits.
    """

    weights: str
    batch: int
    context: int
    step_s: float = 0.0
    limit_s: float = 0.0
    ratio: float = 0.0
    compute_limit_s: float = 0.0


class PrefillCell(Struct, kw_only=True):
    """One prompt in chunks of `chunk`; the GEMM rate is that of the layers' products alone at that many rows."""

    weights: str
    tokens: int
    chunk: int
    tokens_per_s: float = 0.0
    gemm_tokens_per_s: float = 0.0
    ratio: float = 0.0


class LimitRates(Struct, kw_only=True):
    read_bytes_per_s: float = 0.0
    gemm_flops: float = 0.0


class EngineReport(Struct, kw_only=True):
    """Medians over all rounds."""

    machine: str
    model: str
    threads: int
    rounds: int
    limits: LimitRates
    decode: list[DecodeCell] = field(default_factory=list)
    prefill: list[PrefillCell] = field(default_factory=list)


class EngineBench:
    """A model in each form of its weights that decoding may use, over one KV memory."""

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        source: ModelSource,
        threads: int,
        most_tokens: int,
        device: str = "cpu",
        sampling: SamplingParams = _GREEDY,
    ) -> None:
        """`most_tokens` is what the largest cell keeps in KV memory; `device` is `cpu` or `cuda:N`; `sampling` says how
        decode steps draw. Takes seconds.

        Raises ConfigError if there is no such device, or if the machine has not got that memory.
        """
        self._runners: dict[str, TorchRunner] = {}
        self._sampling = sampling
        on_cpu = device == "cpu"
        for form, quantize in (("bf16", "none"), ("int4", "auto"))[: 2 if on_cpu else 1]:
            self._runners[form] = TorchRunner(
                spec,
                source,
                dtype="bfloat16",
                device=device,
                threads=threads,
                name=name,
                block_size=_BLOCK,
                quantize=quantize,  # type: ignore[arg-type]
                dense_twin=False,
            )
        self._dense_bytes = self._runners["bf16"].weight_bytes(1)
        if on_cpu and self._runners["int4"].weight_bytes(1) == self._dense_bytes:
            del self._runners["int4"]  # the file holds no codes
        card = self._runners["bf16"].card
        self._layout = card.layout
        blocks = -(-most_tokens // _BLOCK)
        needed, free = blocks * card.layout.block_bytes, psutil.virtual_memory().available
        if not on_cpu:
            free = min(free, free_bytes(device))  # it has the same bytes, and hands them over in the host's memory
        if needed > free:
            raise ConfigError(
                f"the largest cell needs {needed / 2**30:.1f} GiB of KV memory, and {free / 2**30:.1f} GiB are free;"
                " measure smaller batches or contexts"
            )
        arena = Arena.create(card.layout, blocks)
        arena.bytes.view(np.uint16)[...] = 0x3C10  # 0.009 in bfloat16: a context of plain numbers
        for runner in self._runners.values():
            runner.bind(arena)
            runner.absorb(range(blocks))
        self._limits = Limits(spec, device)
        self.forms = list(self._runners)

    def run(
        self,
        report: EngineReport,
        decode: Sequence[DecodeCell],
        prefill: Sequence[PrefillCell],
        progress: Callable[[], None],
    ) -> None:
        """Fill `report` with `decode` and `prefill`; calls `progress` after each cell of each round."""
        steps: list[list[float]] = [[] for _ in decode]
        prompts: list[list[float]] = [[] for _ in prefill]
        reads: list[float] = []
        gemms: dict[int, list[float]] = {chunk: [] for chunk in {_GEMM_ROWS, *(cell.chunk for cell in prefill)}}
        self._once(decode, prefill, gemms)
        for _ in range(report.rounds):
            reads.append(self._limits.read_rate())
            for cell, found in zip(decode, steps, strict=True):
                found.append(self._decode(cell))
                progress()
            for chunk, found in gemms.items():
                found.append(self._limits.gemm_seconds(chunk))
            for prompt, found in zip(prefill, prompts, strict=True):
                found.append(self._prefill(prompt))
                progress()
        seconds = {chunk: statistics.median(found) for chunk, found in gemms.items()}
        report.limits.read_bytes_per_s = statistics.median(reads)
        report.limits.gemm_flops = max(self._limits.flops_per_token * n / s for n, s in seconds.items())
        for cell, times in zip(decode, steps, strict=True):
            cell.step_s = statistics.median(times)
            cell.limit_s = self._bytes(cell) / report.limits.read_bytes_per_s
            cell.ratio = cell.limit_s / cell.step_s
            # Two operations for each weight, of which bfloat16 takes two bytes.
            cell.compute_limit_s = cell.batch * self._dense_bytes / report.limits.gemm_flops
        for prompt, times in zip(prefill, prompts, strict=True):
            prompt.tokens_per_s = prompt.tokens / statistics.median(times)
            prompt.gemm_tokens_per_s = prompt.chunk / seconds[prompt.chunk]
            prompt.ratio = prompt.tokens_per_s / prompt.gemm_tokens_per_s
        report.decode.extend(decode)
        report.prefill.extend(prefill)

    def _once(self, decode: Sequence[DecodeCell], prefill: Sequence[PrefillCell], gemms: Iterable[int]) -> None:
        """What only a first call pays: memory that is touched, scratch that grows."""
        self._limits.read_rate()
        for cell in decode:
            self._decode(cell)
        for prompt in prefill:
            self._prefill(prompt)
        for chunk in gemms:
            self._limits.gemm_seconds(chunk)

    def _bytes(self, cell: DecodeCell) -> int:
        kv = cell.batch * cell.context * self._layout.block_bytes // self._layout.block_size
        return self._runners[cell.weights].weight_bytes(cell.batch) + kv

    def _decode(self, cell: DecodeCell) -> float:
        blocks = -(-cell.context // _BLOCK)
        history = [1] * cell.context
        batch = [
            Slice([1], cell.context - 1, range(row * blocks, (row + 1) * blocks), self._sampling, history, 1)
            for row in range(cell.batch)
        ]
        start = time.perf_counter()
        self._runners[cell.weights].execute(batch)
        return time.perf_counter() - start

    def _prefill(self, cell: PrefillCell) -> float:
        tokens = [1 + index % 1000 for index in range(cell.tokens)]
        blocks = range(-(-cell.tokens // _BLOCK))
        start = time.perf_counter()
        for first in range(0, cell.tokens, cell.chunk):
            part = tokens[first : first + cell.chunk]
            last = first + len(part) == cell.tokens
            self._runners[cell.weights].execute(
                [Slice(part, first, blocks, _GREEDY if last else None, tokens if last else (), cell.tokens)]
            )
        return time.perf_counter() - start


def in_blocks(sequences: int, tokens: int) -> int:
    """Tokens of KV memory that `sequences` of `tokens` take, each in blocks of its own."""
    return sequences * -(-tokens // _BLOCK) * _BLOCK


def machine(device: str = "cpu") -> str:
    """The name of the CPU or of the CUDA device."""
    if device != "cpu":
        return device_name(device)
    return cpu_name() or platform.processor() or platform.machine()
