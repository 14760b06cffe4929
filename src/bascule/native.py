"""C files that are compiled once a machine, beside what calls them, and loaded."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from bascule.errors import BasculeError
from bascule.machine import cache_home

log = logging.getLogger(__name__)

DISABLE = "BASCULE_NO_NATIVE"
"""Environment variable that, when set, makes this machine one without compiled code."""
DIGEST_BYTES = 32
"""At the end of a compiled file: of all before."""
_COMPILE_S = 120.0


class NativeUnavailable(BasculeError):
    """Compiled code cannot run here; the message says why and what would help."""


def load(sources: Sequence[Path], flags: Sequence[str], needed: frozenset[str], instead: str) -> ctypes.CDLL:
    """What `sources` (C files, and the headers that they include) compile to with `flags`, from the cache directory or
    compiled now (a few seconds).

    `needed` are features of the CPU. Raises NativeUnavailable where the CPU or the compiler is not what it takes;
    `instead` says what is done then.
    """
    if os.environ.get(DISABLE):
        raise NativeUnavailable(f"native kernels are switched off by {DISABLE}; {instead}")
    if missing := needed - cpu_flags():
        raise NativeUnavailable(f"this CPU lacks {', '.join(sorted(missing))}; {instead}")
    own = shlex.split(os.environ.get("CC", ""))
    compiler = own or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not compiler:
        raise NativeUnavailable(f"no C compiler (cc, gcc or clang) found; install one, for {instead}")
    command = [*compiler, *flags, "-fPIC", "-shared"]
    digest = blake3(b"\0".join(path.read_bytes() for path in sources))
    digest.update(" ".join(command).encode())
    try:
        built = cache_home() / "native" / f"{digest.hexdigest(16)}.so"
        if not _is_whole(built):
            log.info("compiling the kernels for this CPU, once; this takes some seconds")
            _compile(command, [path for path in sources if path.suffix == ".c"], built)
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
    return blake3(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _compile(compiler: Sequence[str], sources: Sequence[Path], built: Path) -> None:
    """Compile into `built`; another process that does the same at this moment does no harm."""
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        output = Path(folder) / built.name
        command = [*compiler, "-o", str(output), *map(str, sources), "-lm"]
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
