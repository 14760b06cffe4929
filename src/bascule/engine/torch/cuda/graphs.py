"""Decode steps as recorded graphs: steps of nearly one shape are padded to it, and replayed as one launch."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bascule.engine.torch.cuda.inputs import Inputs, Shape, StepNumbers, numbers_in, width_of
from bascule.engine.torch.plan import StepPlan

BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Sequences of a graph; larger steps are not recorded, because launching them takes less time than computing."""
_CONTEXT = 1024
_CONTEXT_GROWTH = 4
"""A graph is for contexts of at most 1,024 tokens, of 4,096, of 16,384 and so on."""

logger = logging.getLogger(__name__)

Replay = Callable[[], object]


class Capture(Protocol):
    """What records."""

    def __call__(self, run: Callable[[], None]) -> Replay:
        """Record what `run` does; the answer does the same again, over what then lies in the same memory.

        `run` may be called any number of times. Raises RuntimeError where it cannot be recorded.
        """
        ...


class Compute(Protocol):
    def __call__(
        self, numbers: StepNumbers, kv: Tensor, *, block_size: int, context: int, rows: Tensor | None
    ) -> Tensor:
        """Logits float32 [rows, vocab] of `rows`, or of every token; `context` is the most that a sequence sees."""
        ...


class Bucket(NamedTuple):
    """Steps of at most `batch` sequences that see at most `context` positions each."""

    batch: int
    context: int


class _Graph(NamedTuple):
    shape: Shape
    numbers: Tensor
    replay: Replay


def bucket_of(plan: StepPlan) -> Bucket | None:
    """The least that `plan` fits; None for a step that is not one of decoding, or is too large."""
    count = len(plan.sequences)
    if count > BATCHES[-1] or not count == len(plan.tokens) == len(plan.drawn):
        return None
    context, longest = _CONTEXT, max(sequence.end for sequence in plan.sequences)
    while context < longest:
        context *= _CONTEXT_GROWTH
    return Bucket(BATCHES[bisect_left(BATCHES, count)], context)


class Graphs:
    """The recorded steps of one model over one KV memory, each recorded when it is first needed."""

    def __init__(self, compute: Compute, capture: Capture, inputs: Inputs, *, vocab: int, device: torch.device) -> None:
        self._compute = compute
        self._capture: Capture | None = capture
        self._inputs = inputs
        self._logits = torch.empty(BATCHES[-1], vocab, device=device)
        """Of the latest step. One for all graphs: of their own they would keep hundreds of megabytes each."""
        self._graphs: dict[Bucket, _Graph] = {}
        self._kv: Tensor | None = None

    def run(self, plan: StepPlan, kv: Tensor) -> Tensor | None:
        """Logits [sequences, vocab], which the next step overwrites; None for a step that no graph is for.

        Raises IndexError as `Inputs.send`.
        """
        bucket = bucket_of(plan)
        if bucket is None or self._capture is None:
            return None
        if self._kv is not kv:
            self._graphs.clear()  # they hold the addresses of the former
            self._kv = kv
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._recorded(bucket, plan, kv, self._capture)
            if graph is None:
                return None
            self._graphs[bucket] = graph
        else:
            self._inputs.send(plan, graph.shape, 1, kv.shape[1], graph.numbers)
        graph.replay()
        return self._logits[: len(plan.sequences)]

    def _recorded(self, bucket: Bucket, plan: StepPlan, kv: Tensor, capture: Capture) -> _Graph | None:
        """A graph that has the numbers of `plan`; None, for good, if the device refuses."""
        block_size = plan.sequences[0].block_size
        width = width_of(-(-bucket.context // block_size))
        shape = Shape(tokens=bucket.batch, drawn=0, singles=bucket.batch, chunks=0, width=width, tiles=0)
        memory = self._inputs.send(plan, shape, 1, kv.shape[1])
        numbers, target = numbers_in(memory, shape), self._logits[: bucket.batch]

        def run() -> None:
            target.copy_(self._compute(numbers, kv, block_size=block_size, context=bucket.context, rows=None))

        try:
            return _Graph(shape, memory, capture(run))
        except RuntimeError:
            logger.exception("steps of %d sequences cannot be recorded; computing them kernel by kernel", bucket.batch)
            self._capture = None
            return None


class CudaCapture:
    """Implements `Capture` with CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        current = torch.cuda.current_stream(self._device)
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # what is compiled or allocated once must not be part of it
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread of this process may call CUDA at the same time.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay
