"""KV between a device and the arena: which pieces, in which order, and for how long the host's memory is pinned.

The device is a double that notes what it is asked for; `test_cuda_device.py` has a real one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bascule.engine.torch.cuda.copies import Copies, pieces, pin
from bascule.engine.torch.cuda.graphs import CudaCapture

GPU = torch.device("cuda", 0)


class Double:
    """Of `torch.cuda`, as far as it is used here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.refusal = 0
        double = self

        class Event:
            def synchronize(self) -> None:
                double.notes.append("the host waits for the copies")

            def wait(self, stream: Stream) -> None:
                double.notes.append(f"{stream.name} waits for the copies")

        class Stream:
            def __init__(self, device: object = None, name: str = "the side stream") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                double.notes.append(f"{self.name} waits for {other.name}")

            def record_event(self) -> Event:
                double.notes.append("recorded")
                return Event()

        current = Stream(name="the stream of steps")

        @contextmanager
        def on(what: object) -> Iterator[None]:
            double.notes += [f"on {what.name}"] if isinstance(what, Stream) else []
            yield

        @contextmanager
        def graph(graph: object, **how: object) -> Iterator[None]:
            double.notes.append(f"recording, {how['capture_error_mode']}")
            yield
            double.notes.append("recorded")

        class Graph:
            def replay(self) -> None:
                double.notes.append("replayed")

        class Runtime:
            def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
                double.notes.append(f"pinned {size} at {address}")
                return double.refusal

            def cudaHostUnregister(self, address: int) -> int:
                double.notes.append(f"let go at {address}")
                return 0

        for name, stand_in in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "graph_pool_handle": lambda: (0, 1),
            "device": on,
            "stream": on,
            "current_stream": lambda device=None: current,
            "cudart": Runtime,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Double:
    return Double(monkeypatch)


def test_blocks_are_copied_run_by_run_and_plane_by_plane() -> None:
    source = torch.arange(3 * 48 * 2 * 4.0).view(3, 48, 2, 4)
    target = torch.full_like(source, -1)
    found = list(pieces(source, target, [4, 5, 1], block_size=8))
    for there, here in found:
        assert there.is_contiguous() and here.is_contiguous()
        here.copy_(there)
    assert [len(there) for there, _ in found] == [16] * 3 + [8] * 3
    copied = [*range(32, 48), *range(8, 16)]
    others = [slot for slot in range(48) if slot not in copied]
    assert torch.equal(target[:, copied], source[:, copied])
    assert (target[:, others] == -1).all()


def test_what_is_published_lies_in_the_arena_when_the_call_returns(cuda: Double) -> None:
    arena, kv = torch.zeros(2, 32, 1, 4), torch.ones(2, 32, 1, 4)
    Copies(arena, kv, 8).out([2])
    assert arena[:, 16:24].eq(1).all() and int(arena.sum()) == 64
    assert cuda.notes == [
        "the side stream waits for the stream of steps",
        "on the side stream",
        "recorded",
        "the host waits for the copies",
    ]


def test_what_is_absorbed_is_there_for_the_next_launch(cuda: Double) -> None:
    arena, kv = torch.ones(2, 32, 1, 4), torch.zeros(2, 32, 1, 4)
    Copies(arena, kv, 8).back([0, 3])
    assert kv[:, [*range(8), *range(24, 32)]].eq(1).all() and int(kv.sum()) == 128
    assert cuda.notes == [
        "the side stream waits for the stream of steps",
        "on the side stream",
        "recorded",
        "the stream of steps waits for the copies",
    ]


def test_memory_is_pinned_until_it_goes(cuda: Double) -> None:
    memory = torch.zeros(10)
    address = memory.data_ptr()
    assert pin(memory, GPU)
    assert cuda.notes == [f"pinned 40 at {address}"]
    del memory
    gc.collect()
    assert cuda.notes[1:] == [f"let go at {address}"]


def test_a_device_that_does_not_pin_is_noted_and_used(
    cuda: Double, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.refusal = 2
    made: list[object] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: made.append(device))
    memory = torch.ones(10)
    assert not pin(memory, GPU)
    assert made == [GPU]  # a first call after a refusal is told of it
    assert "40 bytes of KV memory cannot be pinned (CUDA error 2)" in caplog.text
    del memory
    gc.collect()
    assert not any(note.startswith("let go") for note in cuda.notes)


def test_a_step_is_run_before_it_is_recorded(cuda: Double) -> None:
    run: Callable[[], Any] = lambda: cuda.notes.append("run")  # noqa: E731
    replay = CudaCapture(GPU)(run)
    assert cuda.notes == [
        "the side stream waits for the stream of steps",
        "on the side stream",
        "run",
        "the stream of steps waits for the side stream",
        "recording, thread_local",
        "run",
        "recorded",
    ]
    replay()
    assert cuda.notes[-1] == "replayed"
