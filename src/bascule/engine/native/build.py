"""Compiling the C files beside this one, once a machine, and loading them."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from blake3 import blake3

from bascule.errors import BasculeError
from bascule.models.catalog import cache_home

_NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "f16c"}
_CPU_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c")
_FLAGS = ("-O3", *_CPU_FLAGS, "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
_COMPILE_S = 120.0
_DIGEST_BYTES = 32
DISABLE = "BASCULE_NO_NATIVE"
"""Environment variable that, when set, makes this machine one without native kernels."""


class NativeUnavailable(BasculeError):
    """The native kernels cannot run here; the message says why and what would help."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels, from the cache directory or compiled now (a few seconds).

    Import torch before: both then share one OpenMP pool. Raises NativeUnavailable where the CPU or the compiler is not
    what it takes.
    """
    if os.environ.get(DISABLE):
        raise NativeUnavailable(f"native kernels are switched off by {DISABLE}")
    missing = _NEEDED - cpu_flags()
    if missing:
        raise NativeUnavailable(f"this CPU lacks {', '.join(sorted(missing))}; bfloat16 is computed by torch instead")
    own = shlex.split(os.environ.get("CC", ""))
    compiler = own or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not compiler:
        raise NativeUnavailable("no C compiler (cc, gcc or clang) found; install one to compute bfloat16 faster")
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.c"))
    digest = blake3(b"\0".join(path.read_bytes() for path in [*sources, folder / "native.h"]))
    digest.update(" ".join([*compiler, *_FLAGS]).encode())
    try:
        built = cache_home() / "native" / f"{digest.hexdigest(16)}.so"
        if not _is_whole(built):
            _compile(compiler, sources, built)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise NativeUnavailable(f"cannot keep compiled kernels: {error}; set BASCULE_CACHE to a directory") from error
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise NativeUnavailable(f"cannot load {built}: {error}; delete it to have it compiled again") from error


def cpu_flags() -> frozenset[str]:
    """The CPU's features by the kernel's names; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def _is_whole(built: Path) -> bool:
    """The file is there and ends with the digest of all before: loading half a library would kill the process."""
    if not built.exists():
        return False
    content = built.read_bytes()
    return blake3(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _compile(compiler: list[str], sources: list[Path], built: Path) -> None:
    """Compile into `built`; another process that does the same at this moment does no harm."""
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        output = Path(folder) / built.name
        command = [*compiler, *_FLAGS, "-o", str(output), *map(str, sources), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailable(f"compiling the native kernels failed: {error}") from error
        if done.returncode:
            said = done.stderr[-600:].strip() or "without a word"
            raise NativeUnavailable(
                f"compiling the native kernels failed: {compiler[0]} ended with {done.returncode}: {said}"
            )
        with output.open("ab") as file:  # behind what the loader looks at
            file.write(blake3(output.read_bytes()).digest())
        output.replace(built)


if __name__ == "__main__":
    import torch  # noqa: F401  (see `load`)

    try:
        print(f"native kernels: {load()._name}")
    except NativeUnavailable as unavailable:
        print(f"native kernels: {unavailable}")
