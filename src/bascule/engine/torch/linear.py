"""Matrix products with weights that are laid out once, at load, for the kernel that will read them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

_REFINED = 64
"""How many of a row's highest logits are computed again in float32."""


class Linear:
    """`x @ weight.T + bias` for x [rows, in] and weight [out, in]; x is rounded to the weight's dtype.

    In bfloat16 on a CPU, oneDNN's own weight layout is faster than the plain one for few rows, and no slower
    for many. float32 keeps the plain layout.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and _reordering_available()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight
        self._bias = bias
        self._dtype = weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if self._packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        return linear(x, self._weight, self._bias)


class Head:
    """The product that ends in logits: float32 [rows, vocab] for float32 x [rows, in] and weight [vocab, in].

    A bfloat16 product is rounded when it is stored, a logit of 25 by up to 0.06, which turns close calls into ties.
    torch has no such product with a float32 result on a CPU, so the highest logits of each row, which decide what is
    drawn, are computed again: half a percent of a SmolLM2-135M decode step of one row, under three of one of eight.
    """

    def __init__(self, weight: Tensor) -> None:
        """Keeps `weight` beside its own copy in the kernel's layout, if it makes one."""
        self._project = Linear(weight)
        self._weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self._project(x).float()
        if self._weight.dtype is torch.float32:
            return logits
        best = logits.topk(min(_REFINED, logits.shape[-1]), dim=-1, sorted=False).indices
        rows = embedding(best, self._weight).float()
        return logits.scatter_(1, best, torch.bmm(rows, x.unsqueeze(-1)).squeeze(-1))


def _reordering_available() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
