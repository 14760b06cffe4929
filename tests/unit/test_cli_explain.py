"""Which server `bascule explain` asks, and what it says when that cannot be asked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from api_rig import ApiRig
from msgspec.structs import replace
from test_api_decisions import add
from test_observe_decisions import REMOTE, attempt, record

from bascule.cli import servers
from bascule.cli.admin_api import NotAnswered
from bascule.cli.explain import explain
from bascule.errors import ConfigError
from bascule.observe.decisions import Actual, Outcome
from bascule.types import StoreHandoff, Tier


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("BASCULE_ADMIN", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "bascule"


@pytest.fixture
def rig() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


def test_the_only_server_of_this_machine_is_found(rig: ApiRig, capsys: pytest.CaptureFixture[str]) -> None:
    add(rig, record("r"))
    path = servers.announce(rig.server.url, rig.admin.url, "tiny")
    explain("r")
    said = capsys.readouterr().out
    assert re.search(r"chosen.*remote;prefill=a;decode=b", said) and "because" in said
    assert re.search(r"handoff +pushed", said)
    assert re.search(r"TTFT +1000 +2000 +-50 %", said), said
    for row in (r"^\* a > b +1000 +100\.0 +0\.0", r"^  a +1000"):
        assert re.search(row, said, re.MULTILINE), said
    servers.withdraw(path)
    assert servers.running() == []


def test_what_kv_was_brought_and_what_that_spared_is_told(rig: ApiRig, capsys: pytest.CaptureFixture[str]) -> None:
    one = record("r")
    rig.records.open(one)
    rig.records.decided(one, attempt(REMOTE))
    brought = {"loaded_tokens": {"disk": 160}, "loaded_bytes": {"disk": 2_340_000}, "load_s": 0.012, "spared_s": 0.4}
    rig.records.ended(one, Outcome.COMPLETED, Actual(ttft_s=1.0, e2e_s=2.0, cached_tokens=176, **brought))
    explain("r", admin=rig.admin.url)
    said = " ".join(capsys.readouterr().out.split())
    loaded = "of which loaded 160 from disk (2.3 MB), waited for 12.0 ms, computing spared 400.0 ms"
    assert f"176 prompt tokens cached, {loaded}" in said


def test_what_a_handoff_through_the_store_moved_is_told(rig: ApiRig, capsys: pytest.CaptureFixture[str]) -> None:
    one, chosen = record("r"), attempt(REMOTE)
    candidates = tuple(
        replace(each, handed_by=Tier.DISK if each.placement == REMOTE else None) for each in chosen.candidates
    )
    rig.records.open(one)
    rig.records.decided(one, replace(chosen, candidates=candidates))
    moved = StoreHandoff({"disk": 2_400_000}, {"disk": 160}, {"disk": 2_340_000}, 0.012, 7)
    rig.records.ended(one, Outcome.COMPLETED, Actual(ttft_s=1.0, e2e_s=2.0, cached_tokens=0, handoff=moved))
    explain("r", admin=rig.admin.url)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "handoff by way of the disk tier of the store: prefill saved 2.4 MB, decode loaded 160 from disk (2.3 MB), "
        "waited for 12.0 ms and computed 7 prompt tokens again" in said
    )
    explain("r", admin=rig.admin.url, json="-")
    actual = msgspec.json.decode(capsys.readouterr().out)["outputs"][0]["actual"]
    assert actual["handoff"] == {
        "saved_bytes": {"disk": 2_400_000},
        "loaded_tokens": {"disk": 160},
        "loaded_bytes": {"disk": 2_340_000},
        "load_s": 0.012,
        "computed_tokens": 7,
    }


def test_a_rejected_request_is_explained_without_a_choice(rig: ApiRig, capsys: pytest.CaptureFixture[str]) -> None:
    one = record("r")
    rig.records.open(one)
    rig.records.rejected(one, "queue", "9 requests wait [already]")
    rig.records.ended(one, Outcome.REJECTED, Actual(error="9 requests wait [already]"))
    explain("r", admin=rig.admin.url)
    assert "rejected" in (said := capsys.readouterr().out) and "9 requests wait [already]" in said


def test_json_goes_to_a_file_or_alone_to_standard_output(
    rig: ApiRig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    add(rig, record("r"))
    explain("r", admin=rig.admin.url, json="-")
    assert msgspec.json.decode(capsys.readouterr().out)["chosen"] == "remote;prefill=a;decode=b"
    explain("r", admin=rig.admin.url, json=str(tmp_path / "out"))
    assert msgspec.json.decode((tmp_path / "out").read_bytes())["id"] == "r"
    assert "chosen" in capsys.readouterr().out


def test_an_unknown_id_is_told_in_the_servers_words(rig: ApiRig) -> None:
    with pytest.raises(NotAnswered, match="'nothing/at all'"):
        explain("nothing/at all", admin=rig.admin.url)


def test_without_a_server_the_way_to_name_one_is_told() -> None:
    with pytest.raises(NotAnswered, match=r"--admin.*BASCULE_ADMIN"):
        explain("r")


def test_between_two_servers_the_user_is_asked(runtime: Path) -> None:
    path = servers.announce("http://127.0.0.1:1", "http://127.0.0.1:2", "tiny")
    assert path is not None
    other = msgspec.structs.replace(
        msgspec.json.decode(path.read_bytes(), type=servers.Server), admin_url="http://127.0.0.1:4"
    )
    (runtime / "other.json").write_bytes(msgspec.json.encode(other))
    with pytest.raises(ConfigError, match=r"(?s)2 servers.*--admin http://127.0.0.1:"):
        explain("r")


def test_servers_that_were_killed_and_those_of_other_machines_do_not_count(runtime: Path) -> None:
    path = servers.announce("http://127.0.0.1:1", "http://127.0.0.1:2", "tiny")
    assert path is not None and path.stat().st_mode & 0o777 in (0o600, 0o644)
    here = msgspec.json.decode(path.read_bytes(), type=servers.Server)
    servers.withdraw(path)
    dead = msgspec.structs.replace(here, started=here.started - 1000)  # the id was another process's
    away = msgspec.structs.replace(here, machine="elsewhere")
    (runtime / "dead.json").write_bytes(msgspec.json.encode(dead))
    (runtime / "away.json").write_bytes(msgspec.json.encode(away))
    (runtime / "junk.json").write_bytes(b"{")
    assert servers.running() == []
    assert not (runtime / "dead.json").exists() and (runtime / "away.json").exists()


def test_a_folder_that_cannot_be_written_does_not_stop_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.devnull)
    assert servers.announce("http://127.0.0.1:1", "http://127.0.0.1:2", "tiny") is None
    servers.withdraw(None)
    assert servers.running() == []


@pytest.mark.parametrize("given", ["127.0.0.1:8001", "ftp://x", ""])
def test_an_address_that_is_none_is_wrong_use(given: str) -> None:
    with pytest.raises(ConfigError, match="--admin"):
        explain("r", admin=given)


@pytest.mark.parametrize("given", ["http://127.0.0.1:1", "http://127.0.0.1:99999", "http://[::"])
def test_a_server_that_does_not_answer_is_named(given: str) -> None:
    with pytest.raises(NotAnswered, match="cannot reach"):
        explain("r", admin=given)


def test_what_is_no_admin_api_is_told_apart(rig: ApiRig) -> None:
    with pytest.raises(NotAnswered, match="nothing at"):
        explain("r", admin=rig.server.url)
    rig.backend.ready = True
    with pytest.raises(NotAnswered, match="no admin API"):
        explain("r", admin=f"{rig.server.url}/metrics?")
