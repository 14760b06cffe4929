"""What a decoder of the Llama family looks like, read from config.json or from GGUF metadata."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct

from bascule.errors import ModelError
from bascule.models.gguf_file import GgufFile
from bascule.types import KVLayout

logger = logging.getLogger(__name__)

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_KV_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
_GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


_GGUF_SHAPES = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "context_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.dimension_count",
)


class RopeKind(StrEnum):
    """How the rotary frequencies `rope_theta ** (-2i / head_dim)` are changed for long contexts."""

    NONE = "none"
    LINEAR = "linear"
    """Every frequency divided by `factor`."""
    LLAMA3 = "llama3"
    """Low frequencies divided by `factor`, high ones kept, a smooth passage between (Llama 3.1 and later)."""
    FACTORS = "factors"
    """Frequency i divided by `factors[i]`: how GGUF files store the llama3 kind."""


class RopeScaling(Struct, frozen=True, kw_only=True):
    """A rope kind and its numbers; those that the kind does not use keep their defaults."""

    kind: RopeKind = RopeKind.NONE
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    """Context length of the unscaled model, in tokens (kind `llama3`)."""
    factors: tuple[float, ...] = ()
    """`head_dim // 2` divisors (kind `factors`)."""


class ModelSpec(Struct, frozen=True, kw_only=True):
    """The shapes and constants of one model; with its weights it determines every logit."""

    architecture: str
    """One of `SUPPORTED_ARCHITECTURES`."""
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    """Rows of the embedding; may exceed the tokenizer's vocabulary."""
    context: int
    """Longest prompt plus output in tokens; already cut to `sliding_window`, so full attention is exact."""
    rope_theta: float
    rope_scaling: RopeScaling
    norm_eps: float
    tied_embeddings: bool
    attention_bias: bool
    """Biases on the q, k and v projections."""
    output_bias: bool
    """Bias on the attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMS norm over `head_dim` on each query and key head, before rope."""
    sliding_window: int | None
    """Positions a token attends to, itself included; None for all."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def kv_layout(self, dtype: str, block_size: int) -> KVLayout:
        """How blocks of `block_size` tokens of this model's KV lie in memory; `dtype` is bfloat16 or float32."""
        return KVLayout(
            dtype=dtype,
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            planes=2 * self.layers,
            token_bytes=self.kv_heads * self.head_dim * _KV_ITEM_BYTES[dtype],
        )


def _unsupported_architecture(where: str, found: str) -> ModelError:
    """The refusal of a model that this decoder cannot run."""
    return ModelError(
        f"{where} is a {found} model, which is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        f" (in GGUF files: {', '.join(_GGUF_ARCHITECTURES)})"
    )


def spec_from_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelSpec:
    """Read the spec from the contents of config.json and generation_config.json (empty where there is none).

    Takes the keys of transformers 4 (`rope_theta`, `rope_scaling`) and of 5 (`rope_parameters`). Raises ModelError,
    naming `where`, for an architecture or a variant that the decoder cannot compute exactly.
    """
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise _unsupported_architecture(where, str(architecture))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"{where} holds weights quantised by {method!r}; use an unquantised form or a GGUF file")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"{where} uses the activation {activation!r}; only 'silu' is supported")
    qwen2 = architecture == "Qwen2ForCausalLM"
    optional_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and bool(config.get("attention_bias"))
    heads = _positive(config, "num_attention_heads", where)
    hidden = _positive(config, "hidden_size", where)
    theta, scaling = _rope_from_config(config, where)
    window = _window_from_config(config, architecture)
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden // heads
    return _validated(
        ModelSpec(
            architecture=architecture,
            hidden=hidden,
            layers=_positive(config, "num_hidden_layers", where),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or default_head_dim),
            intermediate=_positive(config, "intermediate_size", where),
            vocab=_positive(config, "vocab_size", where),
            context=_context_within_window(_positive(config, "max_position_embeddings", where), window, where),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=qwen2 or optional_bias,
            output_bias=optional_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias")),
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_window=window,
            eos_token_ids=_end_tokens(config, generation),
            bos_token_id=config.get("bos_token_id"),
        ),
        where,
    )


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """Read the spec from a GGUF file's metadata and from which tensors it holds.

    Raises ModelError for an architecture or a variant that the decoder cannot compute exactly.
    """
    where = str(file.path)
    architecture = _GGUF_ARCHITECTURES.get(file.architecture)
    if architecture is None:
        raise _unsupported_architecture(where, file.architecture)
    if int(file.metadata.get("split.count", 1)) > 1:
        raise ModelError(
            f"{where} is one part of a split model; join them with `llama-gguf-split --merge` and serve that"
        )
    foreign = [name for name in file.unmapped_names if name != "rope_freqs.weight"]
    if foreign:
        raise ModelError(f"{where} holds {foreign[0]} and {len(foreign) - 1} other tensors foreign to a {architecture}")
    names = frozenset(file.tensor_names)
    if "model.embed_tokens.weight" not in names:
        raise ModelError(f"{where} holds no token_embd.weight; is it a vocabulary without a model?")
    entries = {key: file.model_value(key) for key in _GGUF_SHAPES}
    heads, hidden = (_positive(entries, key, where) for key in ("attention.head_count", "embedding_length"))
    head_dim = int(entries["attention.key_length"] or hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if entries[key] not in (None, head_dim):
            raise ModelError(f"{where}: {key} is {entries[key]}; only the head dimension, {head_dim}, is supported")
    window = entries["attention.sliding_window"]
    return _validated(
        ModelSpec(
            architecture=architecture,
            hidden=hidden,
            layers=_positive(entries, "block_count", where),
            heads=heads,
            kv_heads=_positive({"attention.head_count_kv": heads} | _given(entries), "attention.head_count_kv", where),
            head_dim=head_dim,
            intermediate=_positive(entries, "feed_forward_length", where),
            vocab=file.raw("model.embed_tokens.weight").shape[0],
            context=_context_within_window(_positive(entries, "context_length", where), window, where),
            rope_theta=float(file.model_value("rope.freq_base", 10000.0)),
            rope_scaling=_rope_from_gguf(file),
            norm_eps=float(file.model_value("attention.layer_norm_rms_epsilon", 1e-6)),
            tied_embeddings="lm_head.weight" not in names,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in names,
            output_bias="model.layers.0.self_attn.o_proj.bias" in names,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in names,
            qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
            sliding_window=window,
            eos_token_ids=_gguf_end_tokens(file),
            bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        ),
        where,
    )


def _validated(spec: ModelSpec, where: str) -> ModelSpec:
    """Return `spec` if its shapes fit together, else raise ModelError."""
    if spec.heads % spec.kv_heads:
        raise ModelError(f"{where}: {spec.heads} attention heads are not a multiple of {spec.kv_heads} key/value heads")
    if spec.head_dim % 2:
        raise ModelError(f"{where}: the head dimension {spec.head_dim} is odd; rotary embedding needs an even one")
    factors = spec.rope_scaling.factors
    if spec.rope_scaling.kind is RopeKind.FACTORS and len(factors) != spec.head_dim // 2:
        raise ModelError(f"{where}: {len(factors)} rope factors for a head dimension of {spec.head_dim}")
    return spec


def _context_within_window(context: int, window: int | None, where: str) -> int:
    """Cut `context` to the attention window, within which full and windowed attention are the same."""
    if window is None or window >= context:
        return context
    logger.warning("%s: context cut from %d to its attention window of %d tokens", where, context, window)
    return window


def _window_from_config(config: Mapping[str, Any], architecture: str) -> int | None:
    """Mistral's window holds in every layer, Qwen's only with `use_sliding_window`; 4096 where none is named."""
    window = config.get("sliding_window", 4096)
    if architecture.startswith("Qwen") and not config.get("use_sliding_window"):
        return None
    return window if architecture != "LlamaForCausalLM" else None


def _rope_from_config(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling]:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    partial = float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    if partial != 1.0:
        raise ModelError(f"{where} rotates only {partial:.0%} of each head (partial_rotary_factor); not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        return theta, _scaling(str(kind), rope, where)
    except KeyError as missing:
        raise ModelError(f"{where}: {kind} rope scaling without {missing}") from None


def _scaling(kind: str, rope: Mapping[str, Any], where: str) -> RopeScaling:
    """Raises KeyError where `rope` lacks a number that the kind needs."""
    match kind:
        case "default":
            return RopeScaling()
        case "linear":
            return RopeScaling(kind=RopeKind.LINEAR, factor=float(rope["factor"]))
        case "llama3":
            return RopeScaling(
                kind=RopeKind.LLAMA3,
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_context=int(rope["original_max_position_embeddings"]),
            )
        case _:
            raise ModelError(
                f"{where} uses the rope scaling {kind!r}; supported are default, linear and llama3. If the model also"
                " runs unscaled, remove the scaling from its config.json and serve it at its original context"
            )


def _end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """What generation_config.json says, else config.json: a number, a list or null."""
    named = generation.get("eos_token_id")
    ids = config.get("eos_token_id") if named is None else named
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)


def _rope_from_gguf(file: GgufFile) -> RopeScaling:
    kind = file.model_value("rope.scaling.type", "none")
    factor = float(file.model_value("rope.scaling.factor", file.model_value("rope.scale_linear", 1.0)))
    factors = file.rope_factors()
    if kind not in ("none", "linear"):
        raise ModelError(f"{file.path} uses the rope scaling {kind!r}; supported are none, linear and rope_freqs")
    if factors is not None:
        return RopeScaling(kind=RopeKind.FACTORS, factors=factors)
    return RopeScaling() if factor in (0.0, 1.0) else RopeScaling(kind=RopeKind.LINEAR, factor=factor)


def _gguf_end_tokens(file: GgufFile) -> tuple[int, ...]:
    """The ends of the text, of a turn and of a message: generation stops at each."""
    keys = (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(int(file.metadata[key]) for key in keys if key in file.metadata))


def _given(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}


def _positive(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    try:
        number = msgspec.convert(value, int)
    except msgspec.ValidationError:
        number = 0
    if number <= 0:
        raise ModelError(f"{where}: {key} must be a positive whole number, found {value!r}")
    return number
