"""What this machine could do at best, measured: reading memory, and matrix products of a model's shapes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bascule.engine.torch.linear import Linear
from bascule.models.spec import ModelSpec

_READ_BYTES = 256 << 20
_DEVICE_READ_BYTES = 2 << 30
_DEVICE_LAYERS = 4


class Limits:
    """Measures on a CPU with the threads that torch has in this process, or on a CUDA device by the device's own clock.

    Each call is one sample; take the median of several.
    """

    def __init__(self, spec: ModelSpec, device: str = "cpu") -> None:
        self._device = torch.device(device)
        on_cpu = self._device.type == "cpu"
        self._bytes = _READ_BYTES if on_cpu else _DEVICE_READ_BYTES
        self._memory = torch.ones(self._bytes // 4, device=self._device)
        heads = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        shapes = (
            (heads, spec.hidden),
            (spec.hidden, spec.heads * spec.head_dim),
            (2 * spec.intermediate, spec.hidden),
            (spec.hidden, spec.intermediate),
        )
        # A layer's weights fit a CPU's cache and a model's do not, so there are as many as the model has.
        layers = spec.layers if on_cpu else min(spec.layers, _DEVICE_LAYERS)
        self._layers = [
            [Linear(torch.randn(shape, dtype=torch.bfloat16, device=self._device)) for shape in shapes]
            for _ in range(layers)
        ]
        self._scale = spec.layers / layers
        self._inputs = [shape[1] for shape in shapes]
        self.flops_per_token = 2 * spec.layers * sum(outputs * inputs for outputs, inputs in shapes)
        """Of the layers' matrix products."""

    def read_rate(self) -> float:
        """Bytes/s of one pass over memory that no cache holds."""
        return self._bytes / self._seconds(lambda: self._memory.sum())

    @torch.inference_mode()
    def gemm_seconds(self, tokens: int) -> float:
        """Seconds that torch needs for the layers' matrix products of `tokens` tokens in bfloat16, and nothing else."""
        inputs = [torch.randn(tokens, size, device=self._device).bfloat16() for size in self._inputs]

        def products() -> None:
            for layer in self._layers:
                for product, x in zip(layer, inputs, strict=True):
                    product(x)

        return self._scale * self._seconds(products)

    def _seconds(self, run: Callable[[], object]) -> float:
        if self._device.type == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        with torch.cuda.device(self._device):
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begun.record()
            run()
            done.record()
            done.synchronize()
            milliseconds: float = begun.elapsed_time(done)
            return milliseconds / 1e3


def free_bytes(device: str) -> int:
    """Of a CUDA device's memory."""
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return int(free)


def device_name(device: str) -> str:
    """Of a CUDA device."""
    return str(torch.cuda.get_device_name(torch.device(device)))
