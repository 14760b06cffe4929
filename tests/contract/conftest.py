"""Places of tiers that several contract tests stand on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from shelf_rig import Ground, ground_of

from support.redis_server import RedisProcess, redis_process


@pytest.fixture(scope="module")
def server() -> Iterator[RedisProcess]:
    """A Redis server for the tests of one file."""
    with redis_process() as process:
        yield process


@pytest.fixture(params=["host", "disk", "remote"])
def ground(
    request: pytest.FixtureRequest, server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ground]:
    """An empty place of each kind, with a shelf to look at it."""
    with ground_of(request.param, server, tmp_path, monkeypatch) as made:
        yield made
