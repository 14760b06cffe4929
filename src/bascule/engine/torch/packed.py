"""A model's weights as the native kernels read them, kept in a file that all workers of a host map."""

from __future__ import annotations

import logging
import mmap
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from blake3 import blake3
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from bascule.engine.native import build
from bascule.engine.torch import packing
from bascule.engine.torch.packing import Quantised, interleaved, pack_bfloat16, pack_nibbles
from bascule.errors import ModelError
from bascule.models.catalog import cache_home, locked
from bascule.models.spec import ModelSpec

BFLOAT16, NIBBLES = 0, 1
_MAGIC = b"bascule1"
_PAGE = 4096
_SPARE = 4
"""A file is kept only where the disk has this many times its size left."""

logger = logging.getLogger(__name__)
Weights = dict[str, Tensor | Quantised]


class Part(Struct, frozen=True, kw_only=True):
    """Where one array lies in the data, and for a matrix its form (`Matrix` in native.h)."""

    offset: int
    bytes: int
    layout: int = BFLOAT16
    planes: int = 0
    outputs: int = 0
    inputs: int = 0


class _Header(Struct, frozen=True):
    parts: dict[str, Part]
    digest: bytes


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Arrays by name: `embedding`, `head` (unless tied), `norm`, `layers.0.gate_up`, `layers.0.gate_up.bias` and so on.

    Vectors are float32. `data` is one run of bytes, aligned to 64 at the least, as is every part in it.
    """

    parts: dict[str, Part]
    data: NDArray[np.uint8]

    def address(self, name: str) -> int | None:
        """Where the part `name` lies in this process's memory; None if there is none."""
        part = self.parts.get(name)
        return None if part is None else int(self.data.ctypes.data) + part.offset

    @property
    def has_codes(self) -> bool:
        return any(part.layout == NIBBLES for part in self.parts.values())


def pack(spec: ModelSpec, weights: Weights) -> PackedWeights:
    """Pack `weights` (by Hugging Face name, matrices bfloat16 or codes) into memory; they are taken out as they go."""
    parts: dict[str, Part] = {}
    arrays: list[NDArray[np.uint8]] = []
    size = 0
    for name, part, array in _packed(spec, weights):
        parts[name] = msgspec.structs.replace(part, offset=size)
        arrays.append(array)
        size += part.bytes + -part.bytes % _PAGE
    data = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
    for part, array in zip(parts.values(), arrays, strict=True):
        data[part.offset : part.offset + part.bytes] = array
    return PackedWeights(parts, data)


def kept(identity: str, make: Callable[[], PackedWeights]) -> PackedWeights:
    """What `make` returns, from the cache directory where it is there and whole.

    `identity` names the model's files and the form. Mapped from a file, its memory is shared by all workers of the
    host. Where no file can be kept (no room, no permission) each has its own.
    """
    digest = blake3(identity.encode())
    for source in (packing.__file__, __file__, Path(build.__file__).with_name("native.h")):
        digest.update(Path(source).read_bytes())
    path = cache_home() / "packed" / f"{digest.hexdigest(16)}.bin"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            if (found := _mapped(path)) is not None:
                return found
            made = make()
            if shutil.disk_usage(path.parent).free < _SPARE * made.data.nbytes:
                return made
            _write(path, made)
        return _mapped(path) or made
    except OSError as error:
        logger.info("packed weights are not kept in %s: %s", path.parent, error)
        return make()


def _write(path: Path, packed: PackedWeights) -> None:
    header = msgspec.msgpack.encode(_Header(packed.parts, blake3(packed.data.data, max_threads=blake3.AUTO).digest()))
    begun = path.with_suffix(".part")
    with begun.open("wb") as file:
        file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        file.write(b"\0" * (-file.tell() % _PAGE))
        file.write(packed.data.data)
    begun.replace(path)


def _mapped(path: Path) -> PackedWeights | None:
    """The file's contents, checked against their digest; None if it is absent, or is to be made again."""
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError):
        return None
    length = int.from_bytes(memory[8:16], "little")
    try:
        if memory[:8] != _MAGIC:
            raise ModelError("it does not begin as it should")
        header = msgspec.msgpack.decode(memory[16 : 16 + length], type=_Header)
        start = 16 + length + -(16 + length) % _PAGE
        data = np.frombuffer(memory, np.uint8, offset=start)
        if blake3(data.data, max_threads=blake3.AUTO).digest() != header.digest:
            raise ModelError("its digest is another")
    except (ModelError, msgspec.MsgspecError, ValueError) as error:
        logger.warning("%s is damaged (%s) and will be made again", path, error)
        return None
    return PackedWeights(header.parts, data)


def _packed(spec: ModelSpec, weights: Weights) -> Iterator[tuple[str, Part, NDArray[np.uint8]]]:
    """Every array of the model; offsets are left to whoever lays them out."""
    yield _matrix("embedding", [weights.pop("model.embed_tokens.weight")])
    if not spec.tied_embeddings:
        yield _matrix("head", [weights.pop("lm_head.weight")])
    yield _vector("norm", weights.pop("model.norm.weight"))
    for index in range(spec.layers):
        yield from _layer(spec, weights, f"layers.{index}.")


def _layer(spec: ModelSpec, weights: Weights, prefix: str) -> Iterator[tuple[str, Part, NDArray[np.uint8]]]:
    def taken(name: str) -> Tensor | Quantised:
        return weights.pop(f"model.{prefix}{name}")

    yield _vector(f"{prefix}attention_norm", taken("input_layernorm.weight"))
    yield _vector(f"{prefix}mlp_norm", taken("post_attention_layernorm.weight"))
    if spec.qk_norm:
        query, key = _tensor(taken("self_attn.q_norm.weight")), _tensor(taken("self_attn.k_norm.weight"))
        yield _vector(f"{prefix}head_norm", torch.cat((query.expand(spec.heads, -1), key.expand(spec.kv_heads, -1))))
    matrices = {
        "query_key_value": ([f"self_attn.{part}_proj" for part in "qkv"], spec.attention_bias),
        "attention_output": (["self_attn.o_proj"], spec.output_bias),
        "gate_up": (["mlp.gate_proj", "mlp.up_proj"], spec.mlp_bias),
        "down": (["mlp.down_proj"], spec.mlp_bias),
    }
    for name, (sources, has_bias) in matrices.items():
        join = interleaved if name == "gate_up" else _below_each_other
        yield _matrix(prefix + name, [taken(f"{source}.weight") for source in sources], join)
        if has_bias:
            yield _vector(f"{prefix}{name}.bias", join(*(_tensor(taken(f"{source}.bias")) for source in sources)))


def _below_each_other(*rows: Tensor) -> Tensor:
    return torch.cat(rows)


def _matrix(
    name: str, sources: Sequence[Tensor | Quantised], join: Callable[..., Tensor] = _below_each_other
) -> tuple[str, Part, NDArray[np.uint8]]:
    """One matrix of the rows of all `sources`, as codes if all of them are codes of the same width."""
    codes = [source for source in sources if isinstance(source, Quantised)]
    if len(codes) == len(sources) and len({source.bits for source in codes}) == 1:
        columns = zip(*((source.codes, source.scale, source.offset) for source in codes), strict=True)
        whole = Quantised(codes[0].bits, *(join(*rows) for rows in columns))
        outputs, inputs = whole.shape
        packed, layout, planes = pack_nibbles(whole), NIBBLES, whole.bits // 4
    else:
        dense = join(*(_tensor(source) for source in sources))
        outputs, inputs = dense.shape
        packed, layout, planes = pack_bfloat16(dense), BFLOAT16, 0
    array = packed.view(torch.uint8).flatten().numpy()
    part = Part(offset=0, bytes=array.nbytes, layout=layout, planes=planes, outputs=outputs, inputs=inputs)
    return name, part, array


def _vector(name: str, values: Tensor | Quantised) -> tuple[str, Part, NDArray[np.uint8]]:
    array = _tensor(values).float().contiguous().view(torch.uint8).flatten().numpy()
    return name, Part(offset=0, bytes=array.nbytes), array


def _tensor(value: Tensor | Quantised) -> Tensor:
    return value.dequantised() if isinstance(value, Quantised) else value
