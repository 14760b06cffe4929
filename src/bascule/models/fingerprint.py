"""One digest for everything that decides a model's KV: two workers may share KV only if theirs are equal."""

from __future__ import annotations

import msgspec
from blake3 import blake3

from bascule.models.source import ModelSource
from bascule.models.spec import ModelSpec


def fingerprint(source: ModelSource, spec: ModelSpec, dtype: str) -> str:
    """BLAKE3 (64 hex digits) over the spec, the dtype and every byte of the weight files, in name order.

    File names and places do not enter, so copies of a model on two hosts agree. Nor does who computes: KV of torch and
    of the native kernels, of codes and of the numbers they stand for in bfloat16, differs by rounding only.
    """
    digest = blake3(max_threads=blake3.AUTO)
    for path in source.weights:
        digest.update(b"%d," % path.stat().st_size)
    digest.update(msgspec.json.encode([spec, dtype]))
    for path in source.weights:
        digest.update_mmap(path)
    return digest.hexdigest()
