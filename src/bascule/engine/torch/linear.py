"""Matrix products with weights that are laid out once, at load, for the kernel that will read them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


class Linear:
    """`x @ weight.T + bias` for x [rows, in] and weight [out, in].

    In bfloat16 on a CPU, oneDNN's own weight layout is nearly twice as fast as the plain one for few rows (30.9 against
    18.2 ms for all products of a SmolLM2-135M decode step) and no slower for many. float32 keeps the plain layout.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and _reordering_available()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return linear(x, self._weight, self._bias)


def _reordering_available() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
