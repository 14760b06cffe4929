"""Which decoder computes a step: the form of the weights that is best for its number of tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from bascule.engine.torch.cuda import trial
from bascule.engine.torch.model import Decoder
from bascule.engine.torch.native import NativeDecoder, why_not
from bascule.engine.torch.packed import PackedWeights, kept, pack
from bascule.engine.torch.packing import Quantised
from bascule.engine.torch.plan import Forward
from bascule.engine.torch.weights import WeightForm, load_native_weights, load_weights
from bascule.errors import ConfigError
from bascule.models.fingerprint import fingerprint
from bascule.models.source import ModelSource
from bascule.models.spec import ModelSpec
from bascule.native import cpu_flags

FEW = 6
"""Tokens of a step up to which codes are faster than bfloat16: what one pass over them can take (see ADR 0007)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoders:
    """One decoder for steps of few tokens, one for the others; they may be the same."""

    few: Forward
    many: Forward

    def for_rows(self, tokens: int) -> Forward:
        """The decoder for a step of `tokens` tokens."""
        return self.few if tokens <= FEW else self.many


def load_decoders(
    spec: ModelSpec,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    threads: int,
    *,
    quantize: WeightForm,
    dense_twin: bool,
) -> Decoders:
    """Read the weights in the forms that this device computes best.

    `quantize` says which matrices become codes (see `load_native_weights`); with `dense_twin` steps of many tokens get
    them in bfloat16 too, at the cost of that memory. Raises ModelError for files that cannot be read or do not fit the
    spec, ConfigError where codes are asked for and cannot be computed.
    """
    obstacle = _obstacle(spec, dtype, device)
    if obstacle is None:
        return _native(spec, source, threads, quantize, dense_twin)
    if quantize in ("int8", "int4"):
        raise ConfigError(f"quantize {quantize} cannot be had: {obstacle}; use auto or none")
    if device.type == "cuda":
        obstacle = trial.why_not(spec, dtype, device)
    if obstacle is not None and dtype is torch.bfloat16:
        logger.info("computing with torch: %s", obstacle)
    weights = load_weights(spec, source, dtype)
    there = {key: weights.pop(key).to(device) for key in list(weights)}
    if obstacle is not None:
        return _both(Decoder(spec, there))
    from bascule.engine.torch.cuda.decoder import cuda_decoder  # needs Triton

    return _both(cuda_decoder(spec, there))


def _both(decoder: Forward) -> Decoders:
    return Decoders(decoder, decoder)


def _obstacle(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the native kernels are not for this model here; None if they are."""
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return "the native kernels compute bfloat16 on a CPU only"
    return why_not(spec)


def _native(spec: ModelSpec, source: ModelSource, threads: int, quantize: WeightForm, dense_twin: bool) -> Decoders:
    def packed(dense: bool) -> PackedWeights:
        def make() -> PackedWeights:
            weights = load_native_weights(spec, source, quantize)
            return pack(spec, dict(_dense(weights)) if dense else weights)

        return kept(fingerprint(source, spec, f"bfloat16 {quantize} {'dense' if dense else ''}"), make)

    if "amx_bf16" in cpu_flags():  # torch's products know matrix tiles, the kernels do not
        weights = load_native_weights(spec, source, quantize)
        has_codes = any(isinstance(weight, Quantised) for weight in weights.values())
        if dense_twin or not has_codes:
            many = Decoder(spec, {name: weight.bfloat16() for name, weight in _dense(weights).items()})
            return Decoders(NativeDecoder(spec, packed(dense=False), threads) if has_codes else many, many)
    codes = packed(dense=False)
    few = NativeDecoder(spec, codes, threads)
    return Decoders(few, NativeDecoder(spec, packed(dense=True), threads) if codes.has_codes and dense_twin else few)


def _dense(weights: dict[str, Tensor | Quantised]) -> dict[str, Tensor]:
    """The same numbers without codes; matrices in bfloat16, which is all that they will be computed in."""
    return {
        name: weight.dequantised().bfloat16() if isinstance(weight, Quantised) else weight
        for name, weight in weights.items()
    }
