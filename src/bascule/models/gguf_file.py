"""Reading a GGUF model file: its metadata, and its tensors under their Hugging Face names.

Only the header is parsed here (the `gguf` package's own reader makes a numpy array of every vocabulary entry, which
takes seconds); types, block sizes and dequantisation are the package's. Format: the GGUF specification of the ggml
project.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from msgspec import Struct
from numpy.typing import NDArray

from bascule.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_TOP_LEVEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class RawTensor(Struct, frozen=True, kw_only=True):
    """A tensor as it is stored, rows in Hugging Face order."""

    name: str
    """As in the file."""
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Logical shape, outermost first, as in PyTorch."""
    data: NDArray[np.uint8]
    """`[*shape[:-1], bytes of one row]`; a row is a whole number of quantisation blocks."""

    def dequantised(self) -> NDArray[np.float32]:
        """The values, of `shape`, in float32. Raises ModelError for a type that cannot be read."""
        try:
            values = gguf.quants.dequantize(self.data, self.type)
        except NotImplementedError:
            raise ModelError(
                f"tensor {self.name} is stored as {self.type.name}, which cannot be read;"
                " use a Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, F16 or BF16 form of the model"
            ) from None
        return np.ascontiguousarray(values, dtype=np.float32).reshape(self.shape)


class _TensorInfo(Struct, frozen=True):
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """An open GGUF file, mapped into memory; nothing is copied before a tensor is asked for.

    Raises ModelError for a file that is missing, not GGUF, or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the model file {path}: {error}") from error
        try:
            cursor = _Cursor(self._map)
            tensor_count, entry_count = self._preamble(cursor)
            self.metadata: dict[str, Any] = {cursor.string(): cursor.value() for _ in range(entry_count)}
            infos = {cursor.string(): _read_info(cursor) for _ in range(tensor_count)}
        except (struct.error, UnicodeDecodeError, ValueError, KeyError) as error:
            raise ModelError(f"{path} is damaged or truncated inside its header ({error}); fetch it again") from error
        alignment = int(self.metadata.get("general.alignment", 32))
        self._data_start = -(-cursor.offset // alignment) * alignment
        self._infos = infos
        self._check_complete()
        self._hf_names = {hf: name for name in infos if (hf := _hf_name(name)) is not None}

    def _preamble(self, cursor: _Cursor) -> tuple[int, int]:
        if cursor.take(4) != _MAGIC:
            raise ModelError(f"{self.path} is not a GGUF file (it does not begin with 'GGUF')")
        version = int(cursor.number("I"))
        if version not in _VERSIONS:
            raise ModelError(f"{self.path} is GGUF version {version}; versions 2 and 3 (little-endian) are supported")
        return int(cursor.number("Q")), int(cursor.number("Q"))

    def _check_complete(self) -> None:
        needed = max((self._data_start + info.offset + info.nbytes for info in self._infos.values()), default=0)
        if needed > len(self._map):
            raise ModelError(f"{self.path} is truncated: it has {len(self._map)} bytes of {needed}; fetch it again")

    @property
    def architecture(self) -> str:
        """`general.architecture`, llama.cpp's word for the model family."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def model_value(self, key: str, default: Any = None) -> Any:
        """The metadata entry `key` under the architecture's own prefix."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The weights' Hugging Face names, in file order."""
        return tuple(self._hf_names)

    @property
    def unmapped_names(self) -> tuple[str, ...]:
        """GGUF names of the tensors that are not weights of the Llama family's decoder."""
        mapped = set(self._hf_names.values())
        return tuple(name for name in self._infos if name not in mapped)

    def raw(self, name: str) -> RawTensor:
        """The stored bytes of the weight with Hugging Face name `name`; KeyError if there is none."""
        stored = self._stored(self._hf_names[name])
        if self.architecture == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
            return _half_split(stored, int(self.model_value("attention.head_count")))
        if self.architecture == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
            heads = int(self.model_value("attention.head_count"))
            return _half_split(stored, int(self.model_value("attention.head_count_kv", heads)))
        return stored

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The weight with Hugging Face name `name`, dequantised."""
        return self.raw(name).dequantised()

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """All weights by Hugging Face name, dequantised one at a time so that memory stays small."""
        for name in self._hf_names:
            yield name, self.tensor(name)

    def rope_factors(self) -> tuple[float, ...] | None:
        """The divisors of the rotary frequencies (`head_dim // 2` of them), where the file has them."""
        if "rope_freqs.weight" not in self._infos:
            return None
        return tuple(self._stored("rope_freqs.weight").dequantised().tolist())

    def _stored(self, gguf_name: str) -> RawTensor:
        info = self._infos[gguf_name]
        data = np.frombuffer(self._map, np.uint8, info.nbytes, self._data_start + info.offset)
        return RawTensor(name=gguf_name, type=info.type, shape=info.shape, data=data.reshape(*info.shape[:-1], -1))


def _hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a weight, None for a tensor that is no weight of the Llama family's decoder."""
    if match := _LAYER_TENSOR.fullmatch(gguf_name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}" if part in _LAYER_NAMES else None
    part, _, kind = gguf_name.rpartition(".")
    return f"{_TOP_LEVEL_NAMES[part]}.{kind}" if part in _TOP_LEVEL_NAMES else None


def _half_split(stored: RawTensor, heads: int) -> RawTensor:
    """Undo llama.cpp's row order for `llama` q and k projections.

    Rope rotates pairs of rows of a head. llama.cpp stores a pair side by side, Hugging Face half a head apart:

        stored   a0 b0 a1 b1 a2 b2 ...      wanted   a0 a1 a2 ... b0 b1 b2 ...

    A bias is one number a row, so it is cut into rows of one number first.
    """
    rows = stored.shape[0]
    per_row = stored.data.reshape(heads, rows // heads // 2, 2, -1)
    data = np.ascontiguousarray(per_row.swapaxes(1, 2)).reshape(stored.data.shape)
    return msgspec.structs.replace(stored, data=data)


def _read_info(cursor: _Cursor) -> _TensorInfo:
    dimensions = int(cursor.number("I"))
    shape = tuple(int(cursor.number("Q")) for _ in range(dimensions))[::-1]
    type_ = GGMLQuantizationType(cursor.number("I"))
    offset = int(cursor.number("Q"))
    block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    if shape and shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} numbers in blocks of {block}")
    elements = int(np.prod(shape, dtype=object))
    return _TensorInfo(type=type_, shape=shape, offset=offset, nbytes=elements // block * block_bytes)


class _Cursor:
    """Reads the header's values in order; struct.error or ValueError where the file ends early."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.offset = 0

    def take(self, count: int) -> bytes:
        if self.offset + count > len(self._data):
            raise ValueError(f"it ends at byte {len(self._data)}, inside a value")
        self.offset += count
        return self._data[self.offset - count : self.offset]

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._data, self.offset)
        self.offset += struct.calcsize("<" + form)
        return value

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        return self._typed(GGUFValueType(self.number("I")))

    def _typed(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        item, count = GGUFValueType(self.number("I")), int(self.number("Q"))
        if item in _SCALARS:
            form = f"<{_SCALARS[item]}"
            packed = self.take(count * struct.calcsize(form))
            return [value for (value,) in struct.iter_unpack(form, packed)]
        return [self._typed(item) for _ in range(count)]
