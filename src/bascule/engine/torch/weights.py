"""Reading a model's tensors into torch: from safetensors or GGUF, checked against the spec, in the dtype served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bascule.engine.torch.packing import GROUP, Quantised, quantise, quantised_as_stored
from bascule.errors import ModelError
from bascule.models.gguf_file import GgufFile
from bascule.models.source import ModelSource, SourceKind
from bascule.models.spec import ModelSpec

WeightForm = Literal["auto", "none", "int8", "int4"]
_NAMES_SHOWN = 4


def load_weights(spec: ModelSpec, source: ModelSource, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read the tensors that `spec` calls for, in `dtype`, into CPU memory, by Hugging Face name; errors as below."""
    return {name: _dense(value, dtype) for name, value in _checked(spec, source, stored=False)}


def load_native_weights(spec: ModelSpec, source: ModelSource, form: WeightForm) -> dict[str, Tensor | Quantised]:
    """The same for the native kernels: vectors in float32, matrices in bfloat16 or as codes; errors as below.

    `auto` leaves as codes what is stored so, `none` leaves no codes, `int8` and `int4` round all matrices to them; but
    the embedding and the head get 8 bits of `int4` too, because an error in a logit shows at once.
    """
    bits = {"int8": 8, "int4": 4}
    found: dict[str, Tensor | Quantised] = {}
    for name, value in _checked(spec, source, stored=form == "auto"):
        if isinstance(value, Tensor) and value.ndim == 2 and form in bits and value.shape[1] % GROUP == 0:
            value = quantise(value, 8 if name.startswith(("model.embed", "lm_head")) else bits[form])
        dtype = torch.bfloat16 if len(value.shape) == 2 else torch.float32
        found[name] = value if isinstance(value, Quantised) else _dense(value, dtype)
    return found


def _dense(value: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
    dense = value.dequantised() if isinstance(value, Quantised) else value
    return dense.to(dtype).contiguous()


def _checked(spec: ModelSpec, source: ModelSource, stored: bool) -> Iterator[tuple[str, Tensor | Quantised]]:
    """The tensors that `spec` calls for, one at a time; with `stored` as they are in the file where that is codes.

    Raises ModelError, naming the tensors, where some are missing, have the wrong shape or belong to no part of the
    decoder (dropping those in silence would compute another model), and where a file is missing or truncated.
    """
    expected = expected_shapes(spec)
    missing = dict.fromkeys(expected)
    foreign: list[str] = []
    for name, tensor in _read(source, stored):
        if name in expected:
            _check_shape(name, tensor, expected[name])
            missing.pop(name, None)
            yield name, tensor
        elif not _is_derived(name, spec):
            foreign.append(name)
    if missing:
        raise ModelError(f"{source.path} lacks tensors of a {spec.architecture}: {_listed([*missing])}; fetch it again")
    if foreign:
        raise ModelError(f"{source.path} holds tensors that no {spec.architecture} has: {_listed(foreign)}")


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by Hugging Face name, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab, spec.hidden)}
    shapes["model.norm.weight"] = (spec.hidden,)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab, spec.hidden)
    for index in range(spec.layers):
        for name, shape in _layer_shapes(spec).items():
            shapes[f"model.layers.{index}.{name}"] = shape
    return shapes


def _layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    query, key_value = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    matrices = {
        "self_attn.q_proj": (query, spec.hidden, spec.attention_bias),
        "self_attn.k_proj": (key_value, spec.hidden, spec.attention_bias),
        "self_attn.v_proj": (key_value, spec.hidden, spec.attention_bias),
        "self_attn.o_proj": (spec.hidden, query, spec.output_bias),
        "mlp.gate_proj": (spec.intermediate, spec.hidden, spec.mlp_bias),
        "mlp.up_proj": (spec.intermediate, spec.hidden, spec.mlp_bias),
        "mlp.down_proj": (spec.hidden, spec.intermediate, spec.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs, has_bias) in matrices.items():
        shapes[f"{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (outputs,)
    norms = {"input_layernorm": spec.hidden, "post_attention_layernorm": spec.hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    return shapes | {f"{name}.weight": (size,) for name, size in norms.items()}


def _read(source: ModelSource, stored: bool) -> Iterator[tuple[str, Tensor | Quantised]]:
    if source.kind is SourceKind.GGUF:
        file = GgufFile(source.path)
        for name in file.tensor_names:
            raw = file.raw(name)
            codes = quantised_as_stored(raw) if stored and len(raw.shape) == 2 else None
            # The file's map is read-only.
            yield name, codes or torch.from_numpy(np.require(raw.dequantised(), requirements="W"))
        return
    for path in source.weights:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read the weights in {path}: {error}; fetch the model again") from error


def _check_shape(name: str, tensor: Tensor | Quantised, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ModelError(f"the tensor {name} has the shape {list(tensor.shape)}, the model's config says {list(shape)}")
    if isinstance(tensor, Tensor) and not tensor.is_floating_point():
        raise ModelError(f"the tensor {name} holds {tensor.dtype}; weights must be float32, float16 or bfloat16")


def _is_derived(name: str, spec: ModelSpec) -> bool:
    """Tensors that old files carry although they follow from others or from the config."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tied_embeddings and name == "lm_head.weight")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
