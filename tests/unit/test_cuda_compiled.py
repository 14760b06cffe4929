"""Every kernel compiles for the GPUs that it is for, and fits a multiprocessor; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'bascule[dev]'")

# In a process of its own: in this one Triton interprets.
_PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bascule.engine.torch.cuda import kernels, launch

POINTERS = {name: "*bf16" for name in "delta out qkv keys values gate_up query".split()}
POINTERS |= {name: "*fp32" for name in "hidden weight cos sin norm parts weights".split()}
POINTERS |= {name: "*i32" for name in "rows slots table lengths tiles".split()}
NUMBERS = {"width": "i32", "splits": "i32", "eps": "fp32", "scale": "fp32"}

def compiled(name, capability, warps, **constants):
    kernel = getattr(kernels, name)
    types = {key: "constexpr" if key in constants else (POINTERS | NUMBERS)[key] for key in kernel.arg_names}
    places = {key: (place,) for place, key in enumerate(kernel.arg_names)}
    aligned = [key for key in types if key in POINTERS or key == "width"]
    source = ASTSource(
        kernel,
        types,
        {places[key]: value for key, value in constants.items()},
        {places[key]: [["tt.divisibility", 16]] for key in aligned},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 2}
    )
    print(json.dumps([name, capability, made.metadata.shared, len(made.asm["cubin"]), "mma" in made.asm["ptx"]]))

for capability in (80, 90):
    for adds, picks in ((False, False), (True, False), (True, True)):
        compiled("add_norm", capability, 8, WIDTH=4096, PAD=4096, ADDS=adds, PICKS=picks)
    for norms in (False, True):
        compiled("turn", capability, 4, HEADS=32, KV_HEADS=8, HALF=64, NORMS=norms, TILE=8)
    compiled("gate", capability, 4, WIDTH=14336, TILE=1024)
    compiled("join", capability, 4, HEADS=32, DIM=128, MOST=launch.MOST_PARTS)
    for dim in DIMS:
        shape = {"KV_HEADS": 8, "GROUP": 4, "DIM": dim, "BLOCK": 16}
        for alone in (True, False):
            compiled("attend_one", capability, 4, PAD=16, TILE=launch.keys_of(dim), ALONE=alone, **shape)
        chunks = launch.chunks_of(dim)
        compiled("attend_chunk", capability, launch.warps_of(chunks, dim), ROWS=chunks.rows, TILE=chunks.keys, **shape)
"""
_MOST_SHARED = 99 * 1024
"""Bytes that a program may have on the smallest of the GPUs since Ampere."""


@pytest.mark.parametrize("dims", [(128,), pytest.param((16, 32, 64, 256), marks=pytest.mark.full)], ids=str)
def test_kernels_compile_and_fit(dims: tuple[int, ...], tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    (tmp_path / "program.py").write_text(_PROGRAM.replace("DIMS", repr(dims)))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 * (7 + 3 * len(dims))
    for name, _, shared, code_bytes, multiplies in found:
        assert code_bytes > 0 and shared <= _MOST_SHARED
        assert multiplies == name.startswith("attend")
