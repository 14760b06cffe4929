"""`--policy pkg.module:function`: somebody else's policy routes a real cluster, and cannot bring it down."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.cluster import run_cli, serve

MODULE = """
from bascule.policies.snapshot import Decision
from bascule.types import Placement


def last(snapshot, query):
    if query.prompt_tokens > 3:
        raise ValueError("too long for me")
    row = max(row for row, usable in enumerate(snapshot.placeable) if usable)
    return Decision(placement=Placement(snapshot.ids[row], snapshot.ids[row]), reason="the last one")
"""


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_policies.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")


@pytest.mark.usefixtures("importable")
def test_a_plug_in_routes_and_the_least_loaded_worker_is_taken_where_it_fails() -> None:
    with serve("smollm2", "--engine", "mock", "--mixed", "3", "--policy", "my_policies:last") as cluster:
        routes = {cluster.complete([1, 2, 3], max_tokens=2)["route"] for _ in range(4)}
        assert len(routes) == 1
        assert {cluster.complete([1, 2, 3, 4], max_tokens=2)["route"] for _ in range(6)} > routes
        log = cluster.log.read_text()
    assert log.count("policy my_policies:last: ValueError: too long for me") == 1


@pytest.mark.usefixtures("importable")
def test_a_plug_in_that_cannot_be_imported_is_told_at_once() -> None:
    run = run_cli("serve", "smollm2", "--engine", "mock", "--policy", "my_policies:first")
    assert run.returncode == 2
    assert "my_policies:first" in run.stderr
