"""The decoder of the Llama family on a GPU: products by torch, all between them by kernels, KV read where it lies."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from bascule.engine.torch.cuda.graphs import Capture, CudaCapture, Graphs
from bascule.engine.torch.cuda.inputs import Inputs, StepNumbers, numbers_in, shape_of
from bascule.engine.torch.cuda.launch import (
    Chunks,
    Heads,
    add_norm,
    attend_chunks,
    attend_one,
    chunks_of,
    gate,
    parts_of,
    turn,
)
from bascule.engine.torch.model import take_layer
from bascule.engine.torch.plan import StepPlan
from bascule.engine.torch.rope import Rope
from bascule.models.spec import ModelSpec


class CudaDecoder:
    """A model's weights and its forward pass. Holds no state of any sequence.

    The same numbers as `model.Decoder`, in the same precision at the same places: products, attention and KV in the
    weights' dtype, sums between them in float32. Nothing of a step waits for the device; its logits are there when the
    stream has got to them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        *,
        processors: int,
        chunks: Chunks | None = None,
        capture: Capture | None = None,
    ) -> None:
        """`weights` by Hugging Face name, all of one dtype and device; taken out of the dictionary as they are used.

        `processors` is the number of the device's multiprocessors, `chunks` how prompts are cut (default: as suits the
        heads); steps of decoding are recorded with `capture`.
        """
        self._spec = spec
        self._heads = Heads(spec.heads, spec.kv_heads, spec.head_dim)
        self._chunks = chunks or chunks_of(spec.head_dim)
        self._processors = processors
        table = 0 if spec.tied_embeddings else weights["model.embed_tokens.weight"].nbytes
        self.weight_bytes = sum(weight.nbytes for weight in weights.values()) - table
        """What a step reads of the weights, in bytes: all but the embedding, unless that is the head too."""
        self._embedding = weights.pop("model.embed_tokens.weight")
        self._device = self._embedding.device
        self._rope = Rope(spec, self._device)
        self._layers = [take_layer(spec, weights, index) for index in range(spec.layers)]
        self._norm = weights.pop("model.norm.weight").float()
        self._head = self._embedding if spec.tied_embeddings else weights.pop("lm_head.weight")
        self._inputs = Inputs(self._device)
        self._graphs: Graphs | None = None
        if capture is not None:
            self._graphs = Graphs(self._compute, capture, self._inputs, vocab=spec.vocab, device=self._device)

    def forward(self, plan: StepPlan, kv: Tensor) -> Tensor:
        """Compute one step; returns float32 logits [rows drawn, vocab], which the next step may overwrite.

        `kv` is [2 * layers, slots, kv_heads, head_dim]; the keys and values of the step's tokens are written into it.
        Raises IndexError for a token or a slot that there is not.
        """
        if plan.tokens.min() < 0 or plan.tokens.max() >= self._spec.vocab:
            raise IndexError(f"a token id is not in the vocabulary of {self._spec.vocab}")
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            logits = self._graphs.run(plan, kv) if self._graphs is not None else None
            return logits if logits is not None else self._launched(plan, kv)

    def _launched(self, plan: StepPlan, kv: Tensor) -> Tensor:
        shape = shape_of(plan, self._chunks.rows)
        numbers = numbers_in(self._inputs.send(plan, shape, self._chunks.rows, kv.shape[1]), shape)
        block_size = plan.sequences[0].block_size
        context = shape.width * block_size
        return self._compute(numbers, kv, block_size=block_size, context=context, rows=numbers.drawn)

    def _compute(
        self, numbers: StepNumbers, kv: Tensor, *, block_size: int, context: int, rows: Tensor | None
    ) -> Tensor:
        spec, dtype = self._spec, self._embedding.dtype
        hidden = embedding(numbers.tokens, self._embedding).float()
        angles = self._rope.angles(numbers.positions)
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            normed = add_norm(hidden, delta, layer.attention_norm, spec.norm_eps, dtype)
            qkv = layer.query_key_value(normed)
            plane = kv[2 * index : 2 * index + 2]
            turn(qkv, angles, layer.head_norm, spec.norm_eps, numbers.slots, plane, self._heads)
            delta = layer.attention_output(self._attention(qkv, plane, numbers, block_size, context))
            normed = add_norm(hidden, delta, layer.mlp_norm, spec.norm_eps, dtype)
            delta = layer.down(gate(layer.gate_up(normed)))
        if rows is not None and not len(rows):
            return hidden.new_empty(0, spec.vocab)
        return _float32_product(add_norm(hidden, delta, self._norm, spec.norm_eps, dtype, rows), self._head)

    def _attention(self, qkv: Tensor, plane: Tensor, numbers: StepNumbers, block_size: int, context: int) -> Tensor:
        """[tokens, heads * head_dim]: sequences of one token by one kernel, chunks by another."""
        out = qkv.new_empty(len(qkv), self._heads.query * self._heads.dim)
        singles = len(numbers.rows)
        if singles:
            attend_one(
                qkv,
                plane,
                numbers.table[:singles],
                numbers.rows,
                numbers.lengths,
                out,
                heads=self._heads,
                block_size=block_size,
                parts=parts_of(singles, self._heads.kv, context, self._processors),
            )
        if len(numbers.tiles):
            attend_chunks(
                qkv,
                plane,
                numbers.table,
                numbers.tiles,
                out,
                heads=self._heads,
                block_size=block_size,
                chunks=self._chunks,
            )
        return out


def cuda_decoder(spec: ModelSpec, weights: dict[str, Tensor]) -> CudaDecoder:
    """Of `weights` that are on a CUDA device."""
    device = weights["model.embed_tokens.weight"].device
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return CudaDecoder(spec, weights, processors=processors, capture=CudaCapture(device))


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, whose float32 sums are not rounded to the dtype of both."""
    if weight.dtype is torch.float32:
        return linear(x, weight)
    return torch.mm(x, weight.t(), torch.float32)
