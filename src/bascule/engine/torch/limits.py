"""What this machine could do at best, measured: reading memory, and matrix products of a model's shapes."""

from __future__ import annotations

import time

import torch

from bascule.engine.torch.linear import Linear
from bascule.models.spec import ModelSpec

_READ_BYTES = 256 << 20


class Limits:
    """Measures with the threads that torch has in this process. Each call is one sample; take the median of several."""

    def __init__(self, spec: ModelSpec) -> None:
        self._memory = torch.ones(_READ_BYTES // 4)
        heads = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        shapes = (
            (heads, spec.hidden),
            (spec.hidden, spec.heads * spec.head_dim),
            (2 * spec.intermediate, spec.hidden),
            (spec.hidden, spec.intermediate),
        )
        # A layer's weights fit the cache and a model's do not, so there are as many as the model has.
        self._layers = [
            [Linear(torch.randn(shape, dtype=torch.bfloat16)) for shape in shapes] for _ in range(spec.layers)
        ]
        self._inputs = [shape[1] for shape in shapes]
        self.flops_per_token = 2 * spec.layers * sum(outputs * inputs for outputs, inputs in shapes)
        """Of the layers' matrix products."""

    def read_rate(self) -> float:
        """Bytes/s of one pass over memory that no cache holds."""
        start = time.perf_counter()
        self._memory.sum()
        return _READ_BYTES / (time.perf_counter() - start)

    @torch.inference_mode()
    def gemm_seconds(self, tokens: int) -> float:
        """Seconds that torch needs for the layers' matrix products of `tokens` tokens in bfloat16, and nothing else."""
        inputs = [torch.randn(tokens, size).bfloat16() for size in self._inputs]
        start = time.perf_counter()
        for layer in self._layers:
            for product, x in zip(layer, inputs, strict=True):
                product(x)
        return time.perf_counter() - start
