"""The engine's compiled kernels: the C files beside this one."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from bascule import native
from bascule.native import NativeUnavailable

NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "f16c"})
"""Features of the CPU."""
_CPU_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c")
_FLAGS = ("-O3", *_CPU_FLAGS, "-fno-math-errno", "-fopenmp")
SOURCES = [path for kind in ("*.c", "*.h") for path in sorted(Path(__file__).parent.glob(kind))]


@functools.cache
def load() -> ctypes.CDLL:
    """The kernels, see `native.load`. Import torch before: both then share one OpenMP pool."""
    return native.load(SOURCES, _FLAGS, NEEDED, "bfloat16 is computed by torch instead")


if __name__ == "__main__":
    import torch  # noqa: F401  (see `load`)

    try:
        print(f"native kernels: {load()._name}")
    except NativeUnavailable as unavailable:
        print(f"native kernels: {unavailable}")
