"""The decoder on a CPU's own bfloat16 instructions: `Decoder`'s twin over the compiled kernels of `engine/native`."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bascule.engine.native import build
from bascule.engine.torch.packing import Quantised, interleaved, pack_bfloat16, pack_nibbles
from bascule.engine.torch.plan import StepPlan
from bascule.engine.torch.rope import inverse_frequencies
from bascule.models.spec import ModelSpec

Weights = Mapping[str, Tensor | Quantised]
_VECTOR = 32
"""Rows of activations are read this many numbers at a time."""
_BFLOAT16, _NIBBLES = 0, 1
_ALIGNMENT = 64


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("layout", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("head_norm", ctypes.c_void_p),
        ("query_key_value", _Matrix),
        ("attention_output", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("intermediate", "vocab", "threads")),
        ("norm_eps", ctypes.c_float),
        ("frequencies", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("layer", ctypes.POINTER(_Layer)),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "sequences", "drawn")),
        *((name, ctypes.c_void_p) for name in ("token", "position", "slot", "drawn_row", "first_row", "first_run")),
        *((name, ctypes.c_void_p) for name in ("run_start", "run_count", "kv")),
        ("plane", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("scratch", "logits")),
    )


def why_not(spec: ModelSpec) -> str | None:
    """Why this model cannot be computed here natively, in a sentence; None if it can."""
    sizes = {"hidden size": spec.hidden, "MLP size": spec.intermediate, "head size": spec.head_dim}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % _VECTOR]
    if odd:
        return f"the native kernels want multiples of {_VECTOR}, the model has {', '.join(odd)}"
    try:
        build.load()
    except build.NativeUnavailable as unavailable:
        return str(unavailable)
    return None


class NativeDecoder:
    """A model's packed weights and its forward pass. Holds no state of any sequence.

    Inputs of matrix products, attention and KV are bfloat16, all sums and what lies between are float32. Codes are
    multiplied as they are, so 4-bit weights read an eighth of the memory; steps of many rows unpack them to bfloat16.
    """

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor | Quantised], threads: int) -> None:
        """`weights` by Hugging Face name, bfloat16 or codes; taken out of the dictionary as they are packed."""
        self._spec = spec
        self._library = build.load()
        self._library.scratch_bytes.restype = ctypes.c_int64
        self._kept: list[Tensor] = []
        embedding = self._matrix([weights.pop("model.embed_tokens.weight")])
        table = 0 if spec.tied_embeddings else self._kept[0].nbytes
        head = embedding if spec.tied_embeddings else self._matrix([weights.pop("lm_head.weight")])
        self._layers = (_Layer * spec.layers)(
            *(self._layer(weights, f"model.layers.{index}.") for index in range(spec.layers))
        )
        self._model = _Model(
            layers=spec.layers,
            hidden=spec.hidden,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate=spec.intermediate,
            vocab=spec.vocab,
            threads=threads,
            norm_eps=spec.norm_eps,
            frequencies=self._floats(inverse_frequencies(spec)),
            norm=self._floats(weights.pop("model.norm.weight")),
            embedding=embedding,
            head=head,
            layer=self._layers,
        )
        self.weight_bytes = sum(kept.nbytes for kept in self._kept) - table
        """What a step reads of the weights, in bytes: all but the embedding, unless that is the head too."""
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def forward(self, plan: StepPlan, kv: Tensor) -> Tensor:
        """Compute one step; returns float32 logits [rows drawn, vocab].

        `kv` is bfloat16 [2 * layers, slots, kv_heads, head_dim]; the keys and values of the step's tokens are written
        into it.
        """
        logits = torch.empty(len(plan.drawn), self._spec.vocab)
        first_rows = np.array([sequence.rows.start for sequence in plan.sequences] + [len(plan.tokens)], np.int32)
        found = [run for sequence in plan.sequences for run in sequence.context]
        first_runs = np.cumsum([0, *(len(sequence.context) for sequence in plan.sequences)], dtype=np.int32)
        starts = np.array([run.start for run in found], np.int64)
        counts = np.array([run.stop - run.start for run in found], np.int32)
        step = _Step(
            tokens=len(plan.tokens),
            sequences=len(plan.sequences),
            drawn=len(plan.drawn),
            token=plan.tokens.ctypes.data,
            position=plan.positions.ctypes.data,
            slot=plan.slots.ctypes.data,
            drawn_row=plan.drawn.ctypes.data,
            first_row=first_rows.ctypes.data,
            first_run=first_runs.ctypes.data,
            run_start=starts.ctypes.data,
            run_count=counts.ctypes.data,
            kv=kv.data_ptr(),
            plane=kv.stride(0),
            scratch=self._scratch_for(len(plan.tokens)),
            logits=logits.data_ptr(),
        )
        self._library.forward(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    def _scratch_for(self, tokens: int) -> int:
        """The address of enough aligned scratch memory, which grows with the largest step so far."""
        needed = int(self._library.scratch_bytes(ctypes.byref(self._model), ctypes.c_int64(tokens))) + _ALIGNMENT
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        address = self._scratch.data_ptr()
        return address + -address % _ALIGNMENT

    def _layer(self, weights: dict[str, Tensor | Quantised], prefix: str) -> _Layer:
        spec = self._spec
        head_norm = None
        if spec.qk_norm:
            query_norm = _tensor(weights.pop(f"{prefix}self_attn.q_norm.weight"))
            key_norm = _tensor(weights.pop(f"{prefix}self_attn.k_norm.weight"))
            head_norm = torch.cat((query_norm.expand(spec.heads, -1), key_norm.expand(spec.kv_heads, -1)))

        def taken(names: Sequence[str], part: str, wanted: bool = True) -> list[Tensor | Quantised]:
            return [weights.pop(f"{prefix}{name}.{part}") for name in names] if wanted else []

        projections = [f"self_attn.{name}_proj" for name in "qkv"]
        output, both, down = ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]
        return _Layer(
            attention_norm=self._floats(weights.pop(f"{prefix}input_layernorm.weight")),
            mlp_norm=self._floats(weights.pop(f"{prefix}post_attention_layernorm.weight")),
            head_norm=None if head_norm is None else self._floats(head_norm),
            query_key_value=self._matrix(taken(projections, "weight"), taken(projections, "bias", spec.attention_bias)),
            attention_output=self._matrix(taken(output, "weight"), taken(output, "bias", spec.output_bias)),
            gate_up=self._matrix(taken(both, "weight"), taken(both, "bias", spec.mlp_bias), interleave=True),
            down=self._matrix(taken(down, "weight"), taken(down, "bias", spec.mlp_bias)),
        )

    def _matrix(
        self, parts: Sequence[Tensor | Quantised], biases: Sequence[Tensor | Quantised] = (), interleave: bool = False
    ) -> _Matrix:
        """One packed matrix of the rows of all `parts`, those of two in turns with `interleave`."""

        def joined(rows: Sequence[Tensor]) -> Tensor:
            return interleaved(*rows) if interleave else torch.cat(list(rows))

        quantised = [part for part in parts if isinstance(part, Quantised)]
        if len(quantised) == len(parts) and len({part.bits for part in quantised}) == 1:
            codes, scale, offset = (
                joined(rows) for rows in zip(*((q.codes, q.scale, q.offset) for q in quantised), strict=True)
            )
            packed = pack_nibbles(Quantised(quantised[0].bits, codes, scale, offset))
            shape, layout = codes.shape, _NIBBLES
        else:
            dense = joined([_tensor(part) for part in parts])
            packed, shape, layout = pack_bfloat16(dense), dense.shape, _BFLOAT16
        self._kept.append(packed)
        return _Matrix(
            layout=layout,
            planes=quantised[0].bits // 4 if layout == _NIBBLES else 0,
            outputs=shape[0],
            inputs=shape[1],
            data=packed.data_ptr(),
            bias=self._floats(joined([_tensor(bias) for bias in biases])) if biases else None,
        )

    def _floats(self, values: Tensor | Quantised) -> int:
        """The address of `values` in float32, kept as long as the model."""
        kept = _tensor(values).float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _tensor(value: Tensor | Quantised) -> Tensor:
    return value.dequantised() if isinstance(value, Quantised) else value
