"""The decoder on a CPU's own bfloat16 instructions: `Decoder`'s twin over the compiled kernels of `engine/native`."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from bascule.engine.native import build
from bascule.engine.torch.packed import PackedWeights
from bascule.engine.torch.plan import StepPlan
from bascule.engine.torch.rope import inverse_frequencies
from bascule.models.spec import ModelSpec
from bascule.native import NativeUnavailable

_VECTOR = 32
"""Rows of activations are read this many numbers at a time."""
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
    except NativeUnavailable as unavailable:
        return str(unavailable)
    return None


class NativeDecoder:
    """A model's packed weights and its forward pass. Holds no state of any sequence.

    Inputs of matrix products, attention and KV are bfloat16, all sums and what lies between are float32. Codes are
    multiplied as they are, so 4-bit weights read a third of the memory; steps of many rows unpack them to bfloat16.
    """

    def __init__(self, spec: ModelSpec, weights: PackedWeights, threads: int) -> None:
        self._spec = spec
        self._weights = weights
        self._library = build.load()
        self._library.scratch_bytes.restype = ctypes.c_int64
        self._frequencies = inverse_frequencies(spec).contiguous()
        self._layers = (_Layer * spec.layers)(*(self._layer(f"layers.{index}.") for index in range(spec.layers)))
        embedding = self._matrix("embedding")
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
            frequencies=self._frequencies.data_ptr(),
            norm=weights.address("norm"),
            embedding=embedding,
            head=embedding if spec.tied_embeddings else self._matrix("head"),
            layer=self._layers,
        )
        table = 0 if spec.tied_embeddings else weights.parts["embedding"].bytes
        self.weight_bytes = sum(part.bytes for part in weights.parts.values()) - table
        """What a step reads of the weights, in bytes: all but the embedding, unless that is the head too."""
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, spec.vocab)

    def forward(self, plan: StepPlan, kv: Tensor) -> Tensor:
        """Compute one step; returns float32 logits [rows drawn, vocab]. Raises IndexError for what is out of bounds.

        `kv` is bfloat16 [2 * layers, slots, kv_heads, head_dim]; the keys and values of the step's tokens are written
        into it.
        """
        self._check_bounds(plan, kv)
        if len(self._logits) < len(plan.drawn):  # kept, for so much memory is given back at once and faulted in anew
            self._logits = torch.empty(len(plan.drawn), self._spec.vocab)
        logits = self._logits[: len(plan.drawn)]
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

    def _check_bounds(self, plan: StepPlan, kv: Tensor) -> None:
        """The kernels look at no bounds: raises IndexError for a token or a slot that there is not."""
        if plan.tokens.min() < 0 or plan.tokens.max() >= self._spec.vocab:
            raise IndexError(f"a token id is not in the vocabulary of {self._spec.vocab}")
        last = max(run.stop for sequence in plan.sequences for run in sequence.context)
        if plan.slots.min() < 0 or max(int(plan.slots.max()), last - 1) >= kv.shape[1]:
            raise IndexError(f"a slot is not among the {kv.shape[1]} of the KV memory")

    def _scratch_for(self, tokens: int) -> int:
        """The address of enough aligned scratch memory, which grows with the largest step so far."""
        needed = int(self._library.scratch_bytes(ctypes.byref(self._model), ctypes.c_int64(tokens))) + _ALIGNMENT
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        address = self._scratch.data_ptr()
        return address + -address % _ALIGNMENT

    def _layer(self, prefix: str) -> _Layer:
        return _Layer(
            attention_norm=self._weights.address(f"{prefix}attention_norm"),
            mlp_norm=self._weights.address(f"{prefix}mlp_norm"),
            head_norm=self._weights.address(f"{prefix}head_norm"),
            query_key_value=self._matrix(f"{prefix}query_key_value"),
            attention_output=self._matrix(f"{prefix}attention_output"),
            gate_up=self._matrix(f"{prefix}gate_up"),
            down=self._matrix(f"{prefix}down"),
        )

    def _matrix(self, name: str) -> _Matrix:
        part = self._weights.parts[name]
        return _Matrix(
            layout=part.layout,
            planes=part.planes,
            outputs=part.outputs,
            inputs=part.inputs,
            data=self._weights.address(name),
            bias=self._weights.address(f"{name}.bias"),
        )
