"""A model's weights as the native kernels read them, kept in a file that all workers of a host map."""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import torch
from blake3 import blake3
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

from bascule import models
from bascule.engine.native import build
from bascule.engine.torch.packing import Quantised, interleaved, pack_bfloat16, pack_nibbles
from bascule.machine import cache_home
from bascule.models.catalog import locked
from bascule.models.spec import ModelSpec

BFLOAT16, NIBBLES = 0, 1
_MAGIC = b"bascule1"
_HEAD = 48
"""Bytes before the list of parts: magic, its length, the digest."""
_PAGE = 4096
_KEPT_S = 30 * 86400
"""Files that no worker has mapped for this long are removed when another is written."""
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
    with ExitStack() as stack:
        try:
            path = cache_home() / "packed" / f"{_digest_of(identity)}.bin"
            if (found := _mapped(path)) is not None:
                return found
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.with_suffix(".lock")))
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            logger.info("packed weights are not shared between workers: %s", error)
            return make()
        if (found := _mapped(path)) is not None:
            return found  # another worker has made it meanwhile
        made = make()
        return (_mapped(path) if _write(path, made) else None) or made


def _digest_of(identity: str) -> str:
    """Names a file by the model and by all code that has a say in its contents."""
    digest = blake3(identity.encode())
    native = Path(build.__file__).with_name("native.h")
    for source in (
        native,
        *sorted(Path(__file__).parent.glob("*.py")),
        *sorted(Path(models.__file__).parent.glob("*.py")),
    ):
        digest.update(source.read_bytes())
    for package in ("torch", "gguf", "safetensors"):
        digest.update(version(package).encode())
    return digest.hexdigest(16)


def _write(path: Path, packed: PackedWeights) -> bool:
    """Keep `packed` in `path`; False if that cannot be done. Files that nobody has mapped for long make room first."""
    begun = path.with_suffix(".part")
    try:
        begun.unlink(missing_ok=True)
        for old in path.parent.glob("*.bin"):
            if time.time() - old.stat().st_mtime > _KEPT_S:
                old.unlink(missing_ok=True)
        if shutil.disk_usage(path.parent).free < _SPARE * packed.data.nbytes:
            return False
        parts = msgspec.msgpack.encode(packed.parts)
        with begun.open("wb") as file:
            file.write(_MAGIC + len(parts).to_bytes(8, "little") + _digest(parts, packed.data) + parts)
            file.write(b"\0" * (-file.tell() % _PAGE))
            file.write(packed.data.data)
        begun.replace(path)
    except OSError as error:
        logger.info("packed weights are not kept in %s: %s", path.parent, error)
        with suppress(OSError):
            begun.unlink(missing_ok=True)
        return False
    return True


def _mapped(path: Path) -> PackedWeights | None:
    """The file's contents, checked against their digest; None if it is absent, or is to be made again."""
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be used (%s) and will be made again", path, error)
        return None
    length = int.from_bytes(memory[8:16], "little")
    try:
        if memory[:8] != _MAGIC:
            raise ValueError("it does not begin as it should")
        parts = memory[_HEAD : _HEAD + length]
        data = np.frombuffer(memory, np.uint8, offset=_HEAD + length + -(_HEAD + length) % _PAGE)
        if _digest(parts, data) != memory[16:_HEAD]:
            raise ValueError("its digest is another")
        found = PackedWeights(msgspec.msgpack.decode(parts, type=dict[str, Part]), data)
    except (msgspec.MsgspecError, ValueError) as error:
        logger.warning("%s is damaged (%s) and will be made again", path, error)
        return None
    with suppress(OSError):
        os.utime(path)
    return found


def _digest(parts: bytes, data: NDArray[np.uint8]) -> bytes:
    """BLAKE3, 32 bytes, of what a file holds."""
    digest = blake3(parts, max_threads=blake3.AUTO)
    digest.update(data.data)
    return digest.digest()


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
