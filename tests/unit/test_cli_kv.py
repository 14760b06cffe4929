"""`bascule kv`: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from cli_rig import runner

from bascule.kv.hashing import salt_of
from bascule.kv.store import shelves
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.record import Payload, model_digest, pack, tenant_digest
from bascule.types import BlockHash

ONE, TWO = model_digest("one").hex(), model_digest("two").hex()
ANN = tenant_digest(salt_of("ann")).hex()
SECRET = "hunter2"


class Ended:
    """How a command has ended, and what it has said."""

    def __init__(self, code: int, output: str, error: str) -> None:
        self.code, self.output, self.error = code, output, error

    @property
    def places(self) -> list[dict[str, object]]:
        return msgspec.json.decode(self.output, type=dict[str, list[dict[str, object]]])["places"]


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    plain = runner(monkeypatch, capsys, "kv")
    return lambda *arguments: Ended(*plain(*arguments))


def fill(directory: Path, models: str = "one one two", junk: int = 0) -> list[Path]:
    """Blocks of models, and blocks that are no records; returns their files."""
    with closing(DirectoryStore(directory, 1 << 20, timeout_s=20)) as store:
        for number, model in enumerate(models.split() + [""] * junk):
            name = BlockHash(bytes([number]) * 16)
            store.put({name: pack(name, model, (1, 2), Payload("int8", bytes(1000))) if model else bytes(100)})
    return sorted(directory.glob("v1/??/*"))


def test_stats_tell_tier_model_and_codec(run: Run, tmp_path: Path) -> None:
    files = fill(tmp_path, junk=1)
    ended = run("stats", "--disk", tmp_path)
    assert ended.code == 0
    for row in (
        rf"disk +{tmp_path} +{ONE[:12]} +- +int8 +2 ",
        rf"{TWO[:12]} +- +int8 +1 ",
        r"not a record: format +1",
    ):
        assert re.search(row, ended.output), ended.output
    assert re.search(rf"disk, {tmp_path}: 4 blocks, 3\.\d KiB; the place has .* free", ended.output)
    [place] = run("stats", "--disk", tmp_path, "--json", "-").places
    size = files[0].stat().st_size
    assert place["holdings"] == sorted(
        [
            {"model": ONE, "tenant": "", "codec": "int8", "blocks": 2, "bytes": 2 * size},
            {"model": TWO, "tenant": "", "codec": "int8", "blocks": 1, "bytes": size},
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


@pytest.mark.parametrize("model", ["one", ONE, ONE[:8]])
def test_clear_takes_one_model(run: Run, tmp_path: Path, model: str) -> None:
    files = fill(tmp_path)
    assert run("clear", "--disk", tmp_path, "--model", model, "--yes", "--json", "-").places[0]["dropped"] == 2
    assert [file.exists() for file in files] == [False, False, True]


@pytest.mark.parametrize("tenant", ["ann", ANN, ANN[:8]])
def test_stats_show_a_tenant_and_clear_takes_it(run: Run, tmp_path: Path, tenant: str) -> None:
    files = fill(tmp_path)
    with closing(DirectoryStore(tmp_path, 1 << 20, timeout_s=20)) as store:
        for number, model in ((101, "one"), (102, "two")):
            name = BlockHash(bytes([number]) * 16)
            store.put({name: pack(name, model, (1, 2), Payload("int8", bytes(1000)), salt_of("ann"))})
    ended = run("stats", "--disk", tmp_path)
    assert re.search(rf"{ONE[:12]} +{ANN[:12]} +int8 +1 ", ended.output), ended.output
    assert "ann" not in ended.output.replace(str(tmp_path), "")
    place = ["clear", "--disk", tmp_path, "--yes", "--json", "-"]
    nobody = run(*place, "--tenant", "ben-secret")
    assert nobody.places[0]["dropped"] == 0 and "no blocks" in nobody.error and "secret" not in nobody.error
    assert run(*place, "--tenant", ANN[:7]).places[0]["dropped"] == 0, "may be somebody's whole cache_salt"
    done = run(*place, "--tenant", tenant, "--model", "one")
    assert done.places[0]["dropped"] == 1 and f"tenant {ANN}" in done.error
    assert run(*place, "--tenant", tenant).places[0]["dropped"] == 1
    assert all(file.exists() for file in files)
    refused = run(*place, "--tenant", "")
    assert refused.code == 2 and "--tenant is empty" in refused.error


def test_a_model_that_is_not_there_loses_nothing(run: Run, tmp_path: Path) -> None:
    fill(tmp_path)
    assert run("clear", "--disk", tmp_path, "--model", "three", "--yes", "--json", "-").places[0]["dropped"] == 0


def test_a_name_that_several_models_have_is_refused(run: Run, tmp_path: Path) -> None:
    models = [f"model{number}" for number in range(17)]  # of which two begin alike
    files = fill(tmp_path, " ".join(models))
    digests = [model_digest(model).hex() for model in models]
    first = next(digest[0] for digest in digests if sum(each[0] == digest[0] for each in digests) > 1)
    ended = run("clear", "--disk", tmp_path, "--model", first, "--yes")
    assert ended.code == 2 and "--model" in ended.error
    assert all((digest in ended.error) == digest.startswith(first) for digest in digests)
    assert run("clear", "--disk", tmp_path, "--model", "", "--yes").code == 2
    assert all(file.exists() for file in files)


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
