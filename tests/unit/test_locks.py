"""Locks are had, shared, or given up in time, by two descriptors as by two processes."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from bascule.errors import ModelError
from bascule.kv.store import host
from bascule.kv.store.host import HostStore
from bascule.locks import lock
from bascule.models import catalog


def test_a_lock_that_another_holds_is_given_up_in_time_and_had_once_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as mine, path.open("w") as other:
        assert lock(mine.fileno(), fcntl.LOCK_SH, 0.0) and lock(other.fileno(), fcntl.LOCK_SH, 0.0)
        assert not lock(mine.fileno(), fcntl.LOCK_EX, 0.05)
        fcntl.flock(other, fcntl.LOCK_UN)
        assert lock(mine.fileno(), fcntl.LOCK_EX, 5.0)


def test_a_process_that_holds_the_lock_of_the_models_for_ever_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path))
    monkeypatch.setattr(catalog, "_LOCK_PATIENCE_S", 0.05)
    folder = catalog.installed()[0].path.parent
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ModelError, match=r"has held .*lock for 0.05 s; end it \(fuser"):
            catalog.pull("smollm2")


def test_a_host_tier_that_somebody_clears_for_ever_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_CLEARING_S", 0.05)
    with (tmp_path / "users").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"has been clearing it for 0\.05 s"):
            HostStore(tmp_path, 1 << 20)
