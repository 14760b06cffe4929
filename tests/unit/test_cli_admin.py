"""`bascule admin`: what an operator types, what he is told, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import msgspec
import pytest
from api_rig import ApiRig

from bascule.cli import servers
from bascule.cli.admin import drain, reload, resume, role, workers
from bascule.cli.admin_api import NotAnswered
from bascule.errors import ConfigError
from bascule.observe.state import ClusterState
from bascule.types import Role


@pytest.fixture
def rig(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiRig]:
    """A server that is the only one of this user here."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("BASCULE_ADMIN", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with ApiRig() as rig:
        path = servers.announce(rig.server.url, rig.admin.url, "tiny")
        yield rig
        servers.withdraw(path)


def now(rig: ApiRig, state: str) -> None:
    rig.backend.worker = msgspec.structs.replace(rig.backend.worker, state=state, requests=0)


def becomes(rig: ApiRig, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the worker in that state from the third look at it on."""
    asked, looks = rig.backend.state, count(1)

    def look() -> ClusterState:
        if next(looks) == 3:
            now(rig, state)
        return asked()

    monkeypatch.setattr(rig.backend, "state", look)


def test_workers_are_listed(rig: ApiRig, capsys: pytest.CaptureFixture[str]) -> None:
    workers()
    words = capsys.readouterr().out.splitlines()[1].split()
    assert words == ["mixed-0", "mixed", "ready", "cpu:0", "0", "1", "0", "100", "30", "20"]
    workers(json="-")
    assert msgspec.json.decode(capsys.readouterr().out)["workers"][0]["id"] == "mixed-0"


def test_each_command_says_what_has_become_of_the_worker(rig: ApiRig, capsys: pytest.CaptureFixture[str]) -> None:
    drain("mixed-0")
    drain("mixed-0", timeout=1.5, admin=rig.admin.url)
    resume("mixed-0")
    role("mixed-0", Role.DECODE)
    assert capsys.readouterr().out.splitlines() == [
        *["mixed-0 (mixed) is draining, 2 requests left"] * 2,
        "mixed-0 (mixed) is ready",
        "mixed-0 (decode) is ready",
    ]
    assert rig.backend.operations == [("drain", None), ("drain", 1.5), ("resume", None), ("role", "decode")]


def test_a_reload_is_followed_to_its_end(rig: ApiRig, capsys: pytest.CaptureFixture[str]) -> None:
    reload(timeout=30)
    assert capsys.readouterr().out.splitlines() == [
        "0 of 2 workers are reloaded; now mixed-0, which has ended; start it again where nothing does that for you; "
        "with other weights, and waiting: mixed-1",
        "2 of 2 workers are reloaded",
    ]
    assert rig.backend.operations == [("reload", 30.0)]


def test_a_reload_need_not_be_followed_and_its_failure_is_told(rig: ApiRig, capsys: pytest.CaptureFixture[str]) -> None:
    reload(wait=False)
    assert len(rig.backend.reloads) == 2, "asked once"
    rig.backend.reloads[1] = rig.backend.reload_of("failed", 1, "mixed-1 has not come back")
    with pytest.raises(NotAnswered, match="mixed-1 has not come back"):
        reload()
    with pytest.raises(ConfigError, match="--timeout"):
        reload(timeout=-1)


def test_waiting_ends_when_nothing_is_left(
    rig: ApiRig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    becomes(rig, "drained", monkeypatch)
    drain("mixed-0", wait=True)
    assert capsys.readouterr().out.splitlines()[-1] == "mixed-0 (mixed) is drained"
    assert rig.backend.worker.state == "drained"


def test_waiting_for_a_worker_that_somebody_resumes_fails(rig: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    becomes(rig, "ready", monkeypatch)
    with pytest.raises(NotAnswered, match="mixed-0 is ready: it was resumed before"):
        drain("mixed-0", wait=True)


def test_waiting_for_a_worker_that_ends_is_over_with_it(
    rig: ApiRig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = rig.backend.state
    monkeypatch.setattr(rig.backend, "state", lambda: msgspec.structs.replace(asked(), workers=()))
    drain("mixed-0", wait=True)
    assert "mixed-0 is gone" in capsys.readouterr().out


def test_what_the_server_refuses_is_told_in_its_words(rig: ApiRig) -> None:
    with pytest.raises(NotAnswered, match="There is no worker 'a/b'; there are: mixed-0"):
        drain("a/b", wait=True)


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_a_time_that_is_none_is_wrong_use(rig: ApiRig, seconds: float) -> None:
    with pytest.raises(ConfigError, match="--timeout"):
        drain("mixed-0", timeout=seconds)
    assert rig.backend.operations == []


def test_what_is_no_admin_api_is_told_apart(rig: ApiRig) -> None:
    with pytest.raises(NotAnswered, match="nothing at"):
        resume("mixed-0", admin=rig.server.url)
    with pytest.raises(NotAnswered, match="no admin API"):
        workers(admin=f"{rig.server.url}/health?")
