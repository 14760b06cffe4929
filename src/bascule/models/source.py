"""From what a user calls a model to its files: a catalogue name, a local path or a hub id."""

from __future__ import annotations

import difflib
import os
import re
import struct
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from bascule.errors import UNREADABLE, ModelError
from bascule.models import catalog

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors")
_NOT_FROM_HUB = ("consolidated*", "original/*", "*/*")
"""The same weights in their publishers' own formats, and what lies in folders."""
_INDEX = "model.safetensors.index.json"


class SourceKind(StrEnum):
    SAFETENSORS = "safetensors"
    """A directory in Hugging Face format."""
    GGUF = "gguf"
    """One file with weights, configuration and tokenizer."""


class ModelSource(Struct, frozen=True):
    """Where a model's files are."""

    name: str
    """As clients call the model: the catalogue name, the hub id, or the directory's or file's own name."""
    kind: SourceKind
    path: Path
    """The directory, or the GGUF file."""
    weights: tuple[Path, ...]
    """The weight files in name order; for GGUF the one file."""


def resolve(model: str, progress: catalog.Progress | None = None) -> ModelSource:
    """Find the files of `model`: a catalogue name, a local directory, a .gguf file or a hub id `org/name`.

    Downloads what is not on this machine. Raises ModelError, with the remedy, for what cannot be found or is not whole.
    """
    if model in catalog.CATALOG:
        return _gguf(catalog.pull(model, progress), name=model)
    path = Path(os.path.expanduser(model))  # unlike Path's, it leaves a user who is not there alone
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is neither a .gguf file nor a directory in Hugging Face format")
        return _gguf(path, name=path.stem)
    if path.suffix.lower() == ".gguf" or path.is_absolute() or model.startswith((".", "~")):
        raise ModelError(f"there is no model file or directory {path}; check the path")
    if _HUB_ID.fullmatch(model):
        return _from_hub(model)
    known = list(catalog.CATALOG)
    near = difflib.get_close_matches(model, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"unknown model {model!r}.{hint} Give one of {', '.join(known)}, a directory in Hugging Face format,"
        " a .gguf file, or a hub id such as org/name"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError if it cannot be read or is something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, *UNREADABLE) as error:
        raise ModelError(f"cannot read {path}: {error}; fetch the model again") from error


def _gguf(path: Path, name: str) -> ModelSource:
    return ModelSource(name=name, kind=SourceKind.GGUF, path=path, weights=(path,))


def _directory(path: Path, name: str | None = None) -> ModelSource:
    """A directory whose weight files are all there and whole."""
    if not (path / "config.json").is_file():
        inside = sorted(path.glob("*.gguf"))
        hint = f"; to serve a GGUF file, name it: {inside[0]}" if inside else ""
        raise ModelError(f"{path} has no config.json, so it is no model directory in Hugging Face format{hint}")
    weights = _weight_files(path)
    for file in weights:
        _check_whole(file)
    name = name or path.resolve().name
    return ModelSource(name=name, kind=SourceKind.SAFETENSORS, path=path, weights=weights)


def _weight_files(path: Path) -> tuple[Path, ...]:
    """The shards of the index where there is one; else model.safetensors; else every other .safetensors file."""
    index = path / _INDEX
    if index.is_file():
        shards = {path / str(shard) for shard in read_json(index).get("weight_map", {}).values()}
        missing = sorted(shard.name for shard in shards if not shard.is_file())
        if missing:
            raise ModelError(f"{path} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}; fetch it")
    elif (path / "model.safetensors").is_file():
        shards = {path / "model.safetensors"}
    else:
        shards = {file for file in path.glob("*.safetensors") if not file.name.startswith("consolidated")}
    if not shards:
        pickled = any(path.glob("*.bin"))
        hint = " Its .bin files are pickles, which are never loaded; convert them with" if pickled else " Save it with"
        raise ModelError(f"{path} has no .safetensors file.{hint} transformers' save_pretrained()")
    return tuple(sorted(shards))


def _check_whole(path: Path) -> None:
    """Compare a safetensors file's size with what its header promises (8 bytes of length, JSON, tensors)."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > size:
                raise ModelError(f"{path} is truncated or no safetensors file ({size} bytes); fetch it again")
            header = msgspec.json.decode(file.read(header_bytes), type=dict[str, dict[str, Any]])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, LookupError, *UNREADABLE) as error:
        raise ModelError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from error
    needed = 8 + header_bytes + max(ends, default=0)
    if size < needed:
        raise ModelError(f"{path} is truncated: it has {size} bytes of {needed}; fetch it again")


def _from_hub(model: str) -> ModelSource:
    """Download what is needed of a hub repository, or use the hub client's own cache of it."""
    from huggingface_hub import snapshot_download  # imported late: it costs time that local models need not pay

    try:
        path = snapshot_download(model, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_NOT_FROM_HUB))
    except Exception as error:  # the client lets through whatever its HTTP library raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{model!r} is no directory here and could not be fetched from the model hub ({reason}). If the model is"
            " private or gated, log in with `hf auth login`; without access to the hub, copy the model's directory or"
            " a .gguf file to this machine and give its path, or serve smollm2"
        ) from error
    return _directory(Path(path), name=model)
