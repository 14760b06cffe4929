"""`bascule kv`: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cli_rig import runner

from bascule.kv.hashing import salt_of
from bascule.kv.store import shelves
from bascule.kv.store.base import Store
from bascule.kv.store.description import describe, description_name
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.record import Payload, model_digest, pack, tenant_digest
from bascule.kv.store.remote import RemoteStore
from bascule.kv.store.targets import parse_remote
from bascule.types import BlockHash, KVLayout, ModelCard
from support.redis_server import PATIENT, redis_process

ONE, TWO = model_digest("one").hex(), model_digest("two").hex()
ANN = tenant_digest(salt_of("ann")).hex()
SECRET = "hunter2"


class Ended:
    """How a command has ended, and what it has said."""

    def __init__(self, code: int, output: str, error: str) -> None:
        self.code, self.output, self.error = code, output, error

    @property
    def places(self) -> list[dict[str, Any]]:
        return msgspec.json.decode(self.output, type=dict[str, list[dict[str, Any]]])["places"]


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    plain = runner(monkeypatch, capsys, "kv")
    return lambda *arguments: Ended(*plain(*arguments))


def fill(directory: Path, models: str = "one one two", junk: int = 0) -> list[Path]:
    """Blocks of models, and blocks that are no records; returns their files."""
    with closing(DirectoryStore(directory, 1 << 20, timeout_s=20)) as store:
        put(store, models, junk)
    return sorted(directory.glob("v1/??/*"))


def put(store: Store, models: str, junk: int = 0, tenant: str = "", first: int = 0) -> None:
    for number, model in enumerate(models.split() + [""] * junk, first):
        name = BlockHash(bytes([number]) * 16)
        record = pack(name, model, (1, 2), Payload("int8", bytes(1000)), salt_of(tenant))
        assert store.put({name: record if model else bytes(100)}) == 1


def describe_as(store: Store, name: str, *models: str) -> None:
    """As workers do that serve these models under one name."""
    for model in models:
        card = ModelCard(
            name=name, fingerprint=model, context=1, vocab=1, layout=KVLayout("bfloat16", 2, 1, 4, 16, 4, 8)
        )
        record = describe(card)
        assert record is not None and store.put({description_name(model_digest(model)): record}) == 1


def test_stats_tell_tier_model_and_codec(run: Run, tmp_path: Path) -> None:
    files = fill(tmp_path, junk=1)
    ended = run("stats", "--disk", tmp_path)
    assert ended.code == 0
    for row in (
        rf"- +- +{ONE[:8]} +- +int8 +2 ",
        rf"- +- +{TWO[:8]} +- +int8 +1 ",
        r"not a record: format +1",
    ):
        assert re.search(row, ended.output), ended.output
    assert re.search(rf"disk, {tmp_path}: 4 blocks, 3\.\d KiB; the place has .* free", ended.output)
    ended = run("stats", "--disk", tmp_path, "--json", "-")
    assert msgspec.json.decode(ended.output)["failed"] == []
    [place] = ended.places
    size = files[0].stat().st_size
    assert place["holdings"] == sorted(
        [
            {"model": ONE, "tenant": "", "codec": "int8", "blocks": 2, "bytes": 2 * size, "name": "", "dtype": ""},
            {"model": TWO, "tenant": "", "codec": "int8", "blocks": 1, "bytes": size, "name": "", "dtype": ""},
        ],
        key=lambda each: str(each["model"]),
    )
    assert (place["tier"], place["place"], place["blocks"]) == ("disk", str(tmp_path), 4)
    assert place["faults"] == {"format": 1} and place["capacity_bytes"] is not None


def test_json_goes_to_a_file_beside_the_table(run: Run, tmp_path: Path) -> None:
    fill(tmp_path)
    ended = run("verify", "--disk", tmp_path, "--json", tmp_path / "out.json")
    assert "disk" in ended.output
    written = msgspec.json.decode((tmp_path / "out.json").read_bytes())
    assert written["places"][0]["valid"] == 3
    assert run("stats", "--disk", tmp_path, "--json", tmp_path / "no" / "out").code == 2


def test_what_stands_in_a_damaged_block_does_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, 1 << 20, timeout_s=20)) as store:
        for number, codec in enumerate(("\x1b[31m\x07", "[bold]x[/bold]")):
            name = BlockHash(bytes([number]) * 16)
            store.put({name: pack(name, "one", (), Payload(codec, b""))})
    ended = run("stats", "--disk", tmp_path)
    assert "\x1b[31m" not in ended.output and r"'\x1b[31m\x07'" in ended.output
    assert "[bold]x[/bold]" in ended.output


def test_verify_ends_with_1_while_a_block_that_is_not_valid_is_left(run: Run, tmp_path: Path) -> None:
    files = fill(tmp_path, junk=2)
    ended = run("verify", "--disk", tmp_path)
    assert ended.code == 1
    assert re.search(r" 5 +3 +2 format +0", ended.output), ended.output
    assert run("verify", "--disk", tmp_path, "--json", "-").code == 1
    assert all(file.exists() for file in files)
    ended = run("verify", "--disk", tmp_path, "--drop", "--json", "-")
    assert ended.code == 0
    [place] = ended.places
    assert (place["blocks"], place["valid"], place["dropped"], place["left"]) == (5, 3, 2, 0)
    assert [file.exists() for file in files] == [True, True, True, False, False]
    assert run("verify", "--disk", tmp_path).code == 0


def test_clear_does_nothing_until_it_is_told_yes(run: Run, tmp_path: Path) -> None:
    files = fill(tmp_path)
    ended = run("clear", "--disk", tmp_path)
    assert ended.code == 2 and "--yes" in ended.error and str(tmp_path) in ended.error
    assert run("clear", "--disk", tmp_path, "--model", "one").code == 2
    assert all(file.exists() for file in files)
    ended = run("clear", "--disk", tmp_path, "--yes")
    assert ended.code == 0 and re.search(rf"disk +{tmp_path} +3\b", ended.output)
    assert not any(file.exists() for file in files)
    assert run("clear", "--disk", tmp_path, "--yes", "--json", "-").places[0]["dropped"] == 0


def test_models_are_shown_and_cleared_by_the_name_that_they_were_served_as(run: Run, tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, 1 << 20, timeout_s=20)) as store:
        put(store, "one one two three")
        describe_as(store, "org/small", "one", "two")
        describe_as(store, "large", "three")
    ended = run("stats", "--disk", tmp_path)
    for digest, count in ((ONE, 2), (TWO, 1)):
        assert re.search(rf"org/small +bfloat16 +{digest[:8]} +- +int8 +{count} ", ended.output), ended.output
    assert f"disk, {tmp_path}: 4 blocks, " in ended.output
    [place] = run("stats", "--disk", tmp_path, "--json", "-").places
    assert [each["name"] for each in place["holdings"] if each["model"] == ONE] == ["org/small"]
    assert place["models"][ONE]["fingerprint"] == "one" and place["models"][ONE]["layout"]["block_size"] == 16
    ended = run("clear", "--disk", tmp_path, "--model", "org/small", "--yes", "--json", "-")
    assert ended.code == 0 and ended.places[0]["dropped"] == 3
    assert "2 models are called so" in ended.error
    assert ONE in ended.error and TWO in ended.error and model_digest("three").hex() not in ended.error
    left = run("stats", "--disk", tmp_path, "--json", "-").places[0]
    assert [each["name"] for each in left["holdings"]] == ["large"]


def test_a_name_that_one_server_knows_is_that_of_the_blocks_on_the_others(run: Run) -> None:
    with redis_process() as one, redis_process() as two:
        for server, described in ((one, True), (two, False)):
            with closing(RemoteStore(parse_remote(server.url), timeout_s=PATIENT)) as store:
                put(store, "one")
                if described:
                    describe_as(store, "small", "one")
        urls = f"{one.url},{two.url}"
        places = run("stats", "--remote", urls, "--json", "-").places
        assert [place["holdings"][0]["name"] for place in places] == ["small", "small"]
        cleared = run("clear", "--remote", urls, "--model", "small", "--yes", "--json", "-")
        assert [place["dropped"] for place in cleared.places] == [1, 1]


@pytest.mark.parametrize("model", ["one", ONE, ONE[:8]])
def test_clear_takes_one_model(run: Run, tmp_path: Path, model: str) -> None:
    files = fill(tmp_path)
    assert run("clear", "--disk", tmp_path, "--model", model, "--yes", "--json", "-").places[0]["dropped"] == 2
    assert [file.exists() for file in files] == [False, False, True]


@pytest.mark.parametrize("tenant", ["ann", ANN, ANN[:8]])
def test_stats_show_a_tenant_and_clear_takes_it(run: Run, tmp_path: Path, tenant: str) -> None:
    files = fill(tmp_path)
    with closing(DirectoryStore(tmp_path, 1 << 20, timeout_s=20)) as store:
        put(store, "one two", tenant="ann", first=101)
    ended = run("stats", "--disk", tmp_path)
    assert re.search(rf"{ONE[:8]} +{ANN[:8]} +int8 +1 ", ended.output), ended.output
    assert "ann" not in ended.output.replace(str(tmp_path), "")
    place = ["clear", "--disk", tmp_path, "--yes", "--json", "-"]
    nobody = run(*place, "--tenant", "ben-secret")
    assert nobody.code == 1 and nobody.places[0]["dropped"] == 0
    assert "no blocks here are of that tenant" in nobody.error and "secret" not in nobody.error
    assert f"there are {ANN[:8]}\n" in nobody.error and "8 or more of the digits" in nobody.error
    assert run(*place, "--tenant", ANN[:7]).code == 1, "may be somebody's whole cache_salt"
    done = run(*place, "--tenant", tenant, "--model", "one")
    assert done.places[0]["dropped"] == 1 and f"tenant {ANN}" in done.error
    assert run(*place, "--tenant", tenant).places[0]["dropped"] == 1
    assert all(file.exists() for file in files)
    refused = run(*place, "--tenant", "")
    assert refused.code == 2 and "--tenant is empty" in refused.error and "--untenanted" in refused.error


def test_the_blocks_of_no_tenant_can_be_cleared_by_themselves(run: Run, tmp_path: Path) -> None:
    files = fill(tmp_path)
    with closing(DirectoryStore(tmp_path, 1 << 20, timeout_s=20)) as store:
        put(store, "one", tenant="ann", first=101)
        describe_as(store, "small", "one", "two")
    place = ["clear", "--disk", tmp_path, "--json", "-"]
    asked = run(*place, "--untenanted")
    assert asked.code == 2 and "the blocks of no tenant" in asked.error and all(file.exists() for file in files)
    both = run(*place, "--untenanted", "--tenant", "ann", "--yes")
    assert both.code == 2 and all(file.exists() for file in files)
    assert run(*place, "--untenanted", "--model", "two", "--yes").places[0]["dropped"] == 1
    assert [file.exists() for file in files] == [True, True, False]
    assert run(*place, "--untenanted", "--yes").places[0]["dropped"] == 2
    again = run(*place, "--untenanted", "--yes")
    assert again.code == 1 and again.places[0]["dropped"] == 0 and "nothing was dropped" in again.error
    [left] = run("stats", "--disk", tmp_path, "--json", "-").places
    assert [(each["tenant"], each["name"]) for each in left["holdings"]] == [(ANN, "small")]


def test_what_is_not_there_is_told_with_what_is_and_ends_with_1(run: Run, tmp_path: Path) -> None:
    files = fill(tmp_path)
    with closing(DirectoryStore(tmp_path, 1 << 20, timeout_s=20)) as store:
        describe_as(store, "small", "one")
        put(store, "three", tenant="ann", first=101)
    for asked in ("four", ONE[:7], ONE[:2], "0" * 32):
        ended = run("clear", "--disk", tmp_path, "--model", asked, "--yes", "--json", "-")
        assert ended.code == 1 and ended.places[0]["dropped"] == 0
        assert "no blocks here are of that model" in ended.error and "8 or more of the digits" in ended.error
        assert f"{ONE[:8]} small" in ended.error and TWO[:8] in ended.error
    ended = run("clear", "--disk", tmp_path, "--model", "one", "--tenant", "ann", "--yes")
    assert ended.code == 1 and "nothing was dropped" in ended.error, "there are blocks of each, but none of both"
    assert all(file.exists() for file in files)
    assert run("clear", "--disk", tmp_path, "--yes").code == 0
    assert run("clear", "--disk", tmp_path, "--yes").code == 0, "all of nothing is nothing"


def test_digits_that_several_models_begin_with_are_refused(run: Run, tmp_path: Path) -> None:
    models = ("model-12475", "model-45293", "one")
    files = fill(tmp_path, " ".join(models))
    digests = [model_digest(model).hex() for model in models]
    assert digests[0][:8] == digests[1][:8]
    ended = run("clear", "--disk", tmp_path, "--model", digests[0][:8], "--yes")
    assert ended.code == 2 and "--model" in ended.error
    assert [digest in ended.error for digest in digests] == [True, True, False]
    assert run("clear", "--disk", tmp_path, "--model", "", "--yes").code == 2
    assert all(file.exists() for file in files)
    assert run("clear", "--disk", tmp_path, "--model", digests[0], "--yes").code == 0
    assert [file.exists() for file in files] == [False, True, True]


def test_a_place_that_fails_is_told_beside_what_the_others_hold(run: Run, tmp_path: Path) -> None:
    fill(tmp_path, junk=1)
    away = ["--remote", f"redis://:{SECRET}@127.0.0.1:1"]
    for command, shown in (("stats", "4 blocks"), ("verify", "1 format")):
        ended = run(command, "--disk", tmp_path, *away)
        assert ended.code == 1 and shown in ended.output
        assert re.search(r"--remote: 127\.0\.0\.1:1/0 is gone.*start it", ended.error) and SECRET not in ended.error
        ended = run(command, "--disk", tmp_path, *away, "--json", "-")
        assert ended.code == 1 and [place["blocks"] for place in ended.places] == [4]
        [failed] = msgspec.json.decode(ended.output)["failed"]
        assert failed["place"] == "127.0.0.1:1/0" and "is gone" in failed["error"]
    assert run("verify", "--disk", tmp_path, *away, "--drop", "--json", "-").places[0]["dropped"] == 1
    assert run("verify", "--disk", tmp_path, *away).code == 1, "the other may hold some"
    with redis_process() as server:
        ended = run("stats", "--remote", f"{server.url},127.0.0.1:1", "--json", "-")
        assert ended.code == 1 and [place["place"] for place in ended.places] == [f"127.0.0.1:{server.port}/0"]
    ended = run("stats", "--disk", tmp_path / "away", *away)
    assert (ended.code, ended.output) == (2, "") and "--disk" in ended.error and "--remote" in ended.error


def test_tables_fit_a_screen_of_80_columns(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a-directory-with-quite-a-long-name" / "for-blocks"
    place.mkdir(parents=True)
    fill(place)
    with closing(DirectoryStore(place, 1 << 20, timeout_s=20)) as store:
        put(store, "one", tenant="ann", first=101)
        describe_as(store, "SomeOrganisation/some-model-of-35-chars", "one")
    monkeypatch.setenv("COLUMNS", "80")
    lines = run("stats", "--disk", place).output.splitlines()
    assert max(map(len, lines[1:])) <= 80, "the first line is the place's, whose name is whole"
    assert str(place) in lines[0]
    header = lines[1]
    for row in [line for line in lines if ONE[:8] in line or TWO[:8] in line]:
        for column in ("blocks", "size"):
            end = header.index(column) + len(column)
            assert row[end - 1] != " " and row[end : end + 2].strip() == "", (header, row)
        at = header.index("digest")
        assert row[at : at + 8] in (ONE[:8], TWO[:8])
        at = header.index("tenant")
        assert row[at : at + 8].strip() in ("-", ANN[:8])
    for command in ("verify", "clear"):
        lines = run(command, "--disk", place, *(["--yes"] if command == "clear" else [])).output.splitlines()
        assert max(map(len, lines)) <= 80
        assert re.match(r"disk +\S+ +(4 +4 +0 +0|4)\b", lines[1]), lines


@pytest.mark.parametrize("command", ["stats", "verify", "clear"])
def test_a_place_that_cannot_be_used_is_named(run: Run, tmp_path: Path, command: str) -> None:
    def refused(*arguments: object) -> str:
        ended = run(command, *arguments, *(["--yes"] if command == "clear" else []))
        assert (ended.code, ended.output) == (2, "")
        return ended.error

    assert "--host, --disk DIR or --remote URLS" in refused()
    assert re.search(r"--disk.*not there.*--kv-disk", refused("--disk", tmp_path / "away"))
    assert re.search(r"--disk.*no store in it.*mounted", refused("--disk", tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert f"write {tmp_path}, without a size" in refused("--disk", f"{tmp_path}:5GiB")
    assert re.search(r"--remote: server 1 .*redis://", refused("--remote", f"http://:{SECRET}@h"))
    gone = refused("--remote", f"redis://:{SECRET}@127.0.0.1:1")
    assert re.search(r"--remote: 127\.0\.0\.1:1/0 is gone.*start it", gone) and SECRET not in gone


def test_no_place_is_cleared_if_one_of_them_cannot_be_reached(run: Run, tmp_path: Path) -> None:
    files = fill(tmp_path)
    ended = run("clear", "--disk", tmp_path, "--remote", "redis://127.0.0.1:1", "--yes")
    assert ended.code == 2 and all(file.exists() for file in files)


def test_the_host_tier_must_be_this_users_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "host"
    monkeypatch.setattr(shelves, "host_directory", lambda: directory)
    assert re.search(r"--host.*--kv-host", run("stats", "--host").error)
    directory.mkdir(mode=0o700)
    fill(directory)
    assert run("stats", "--host", "--json", "-").places[0]["tier"] == "host"
    directory.chmod(0o777)
    ended = run("clear", "--host", "--yes")
    assert ended.code == 2 and "not a folder of this user alone" in ended.error
    assert len(list(directory.glob("v1/??/*"))) == 3


def test_a_secret_that_looks_like_digits_is_its_own_tenant_first(run: Run, tmp_path: Path) -> None:
    """Of two tenants one has chosen as its secret what the other is called by."""
    with closing(DirectoryStore(tmp_path, 1 << 20, timeout_s=20)) as store:
        for number, secret in enumerate(("ann", ANN[:8])):
            name = BlockHash(bytes([number]) * 16)
            store.put({name: pack(name, "one", (1, 2), Payload("int8", bytes(1000)), salt_of(secret))})
    done = run("clear", "--disk", tmp_path, "--yes", "--json", "-", "--tenant", ANN[:8])
    assert done.places[0]["dropped"] == 1 and ANN not in done.error
