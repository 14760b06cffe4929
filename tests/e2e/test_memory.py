"""What a worker takes beside its weights and its KV, on the start that packs the weights and on the next one."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from bascule.machine import cache_home
from support.cluster import Cluster, serve

MOST = 400 * 2**20
UNPACKED = 269_030_016
"""Bytes of the weights in bfloat16, where torch computes and nothing is packed."""


def beside(cluster: Cluster, cache: Path) -> int:
    """Bytes of the only worker's PSS that are neither weights (packed ones are files that it maps) nor KV, which is
    shared memory."""
    pid = cluster.pid("mixed-0")
    weights = sum(path.stat().st_size for path in (cache / "packed").glob("*.bin")) or UNPACKED
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kv = next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Shmem:"))
    return int(psutil.Process(pid).memory_full_info().pss) - weights - kv


def test_a_worker_takes_400_mib_at_most_beside_weights_and_kv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usual = cache_home()
    for kept in ("models", "native"):
        if (usual / kept).exists():
            tmp_path.joinpath(kept).symlink_to(usual / kept)
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path))
    for start in ("the first", "the next"):
        with serve("smollm2", "--policy", "single") as cluster:
            cluster.complete("Weights are packed once.", max_tokens=8)
            assert beside(cluster, tmp_path) < MOST, f"{start} start"
