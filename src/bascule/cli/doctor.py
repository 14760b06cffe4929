"""`bascule doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from msgspec import Struct
from rich.console import Console

from bascule.config import parse_size
from bascule.engine.native import build
from bascule.errors import BasculeError
from bascule.models import catalog, load

_ENGINE_MODULES = ("torch", "safetensors")


class Finding(Struct, frozen=True):
    """One thing looked at: fine, or what is wrong and how to mend it."""

    ok: bool
    what: str
    mend: str = ""


def doctor(model: str = "smollm2", /, *, kv_memory: str = "1GiB", workers: int = 2) -> None:
    """Check this machine for serving a model; exit code 1 if something is in the way.

    Example: bascule doctor smollm2 --workers 2

    Parameters
    ----------
    model
        The model that you want to serve.
    kv_memory
        KV memory of each worker.
    workers
        How many workers are to run here.
    """
    console = Console()
    findings = [*_software(), *_hardware(parse_size(kv_memory, "kv-memory") * workers), *_model(model)]
    for finding in findings:
        console.print(f"{'ok   ' if finding.ok else 'WRONG'}  {finding.what}", highlight=False)
        if finding.mend:
            console.print(f"       {finding.mend}", highlight=False)
    if not all(finding.ok for finding in findings):
        sys.exit(1)


def _software() -> Iterator[Finding]:
    yield Finding(True, f"Python {sys.version.split()[0]}")
    for name in _ENGINE_MODULES:
        found = importlib.util.find_spec(name) is not None
        yield Finding(found, f"package {name}", "" if found else "workers need it: pip install 'bascule[engine]'")


def _hardware(kv_bytes: int) -> Iterator[Finding]:
    cores = sorted(os.sched_getaffinity(0))
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    yield Finding(True, f"{len(cores)} usable cores, {' '.join(extensions) or 'no AVX'}")
    yield Finding(
        len(cores) > 1,
        "a core for each of a prefill and a decode worker",
        "" if len(cores) > 1 else "prefill and decode will share one core; --policy single may be faster",
    )
    yield _kernels()
    free = psutil.virtual_memory().available
    yield Finding(
        free > kv_bytes,
        f"{free / 2**30:.1f} GiB of memory free for {kv_bytes / 2**30:.1f} GiB of KV blocks",
        "" if free > kv_bytes else "give less with --kv-memory, or stop something",
    )
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Finding(limit >= 1024, f"{limit} open files allowed", "" if limit >= 1024 else "raise it: ulimit -n 4096")


def _kernels() -> Finding:
    """Whether bfloat16 is computed by compiled kernels; torch does it too, so this is never in the way."""
    try:
        build.load()
    except build.NativeUnavailable as unavailable:
        return Finding(True, "no native kernels: bfloat16 is computed by torch, several times slower", str(unavailable))
    return Finding(True, "native kernels for bfloat16 and 4-bit weights")


def _model(model: str) -> Iterator[Finding]:
    if any(entry.name == model and entry.state is not catalog.FileState.READY for entry in catalog.installed()):
        yield Finding(True, f"model {model} is not on this machine yet", f"get it: bascule models pull {model}")
        return
    try:
        spec = load(model).spec
    except BasculeError as error:
        yield Finding(False, f"model {model}", str(error))
    else:
        yield Finding(True, f"model {model}: {spec.architecture}, {spec.layers} layers, context {spec.context}")
