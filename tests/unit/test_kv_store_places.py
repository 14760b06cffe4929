"""What is asked for on the command line is parsed, checked against the machine, and refused with the key's name."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import psutil
import pytest

from bascule.config import StoreConfig
from bascule.errors import ConfigError
from bascule.kv.store import folder, places, remote
from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.places import (
    DiskPlace,
    check_host,
    check_stores,
    disk_store,
    host_store,
    open_stores,
    parse_disk,
    parse_host,
)
from bascule.kv.store.shelves import disk_shelf
from bascule.kv.store.targets import parse_remote
from bascule.types import BlockHash, Tier
from support.certificates import certify

SECRET = "hunter2"
_MORE = ("xn--bcher-kva.example:6379/0", "b\u00fccher:6379/0", "fe80::1%25eth0:7000/0")


def test_sizes_and_places() -> None:
    assert parse_host("4GiB") == 4 << 30
    assert parse_disk("/var/kv:50GiB") == DiskPlace(Path("/var/kv"), 50 << 30)
    assert parse_disk("/odd:name:1MB") == DiskPlace(Path("/odd:name"), 10**6)
    assert parse_disk("~/kv:1B").directory == Path.home() / "kv"


@pytest.mark.parametrize("text", ["", "4 gigs", "-1GiB", "0", "0GiB", "GiB"])
def test_a_malformed_host_size_names_the_key(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-host"):
        parse_host(text)


@pytest.mark.parametrize(
    "text", ["", "/var/kv", "50GiB", ":50GiB", "/var/kv:", "/var/kv:fifty", "/var/kv:0", "/v\0:1MiB"]
)
def test_a_malformed_disk_place_names_the_key(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-disk"):
        parse_disk(text)


def test_a_host_budget_larger_than_the_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--kv-host.*memory.*ask for less"):
        host_store(psutil.virtual_memory().total + 1, tmp_path)


def test_a_host_budget_larger_than_its_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 20, 0, 1 << 20))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"--kv-host.*free"):
        host_store(2 << 20, tmp_path)


def test_a_host_store_is_private_to_its_user(tmp_path: Path) -> None:
    store = host_store(1 << 20, tmp_path)
    store.close()
    assert store.tier is Tier.HOST
    folder = tmp_path / f"bascule-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "v1").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("trap", ["open", "link", "file"])
def test_a_host_folder_that_somebody_else_prepared_is_refused(tmp_path: Path, trap: str) -> None:
    folder = tmp_path / f"bascule-{os.getuid()}"
    if trap == "open":
        folder.mkdir()
        folder.chmod(0o777)
    elif trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.write_text("")
    with pytest.raises(ConfigError, match="--kv-host"):
        host_store(1 << 20, tmp_path)


def test_a_disk_store_makes_its_directory(tmp_path: Path) -> None:
    store = disk_store(DiskPlace(tmp_path / "a" / "b", 1 << 20))
    store.close()
    assert store.tier is Tier.DISK
    assert (tmp_path / "a" / "b" / "v1").is_dir()


def test_a_disk_budget_larger_than_the_file_system_is_refused(tmp_path: Path) -> None:
    total = shutil.disk_usage(tmp_path).total
    with pytest.raises(ConfigError, match=r"--kv-disk.*whole file system"):
        disk_store(DiskPlace(tmp_path, total + 1))


def test_a_disk_directory_that_cannot_be_made_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/bascule-kv")):
        with pytest.raises(ConfigError, match=r"--kv-disk.*cannot be used.*give a directory"):
            disk_store(DiskPlace(directory, 1 << 20))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("redis://h1", ["h1:6379/0"]),
        ("redis://h1,h2", ["h1:6379/0", "h2:6379/0"]),
        ("redis://h1:7000/3, h2:7001 ,h3", ["h1:7000/3", "h2:7001/3", "h3:6379/3"]),
        ("rediss://u:p@h1,redis://h2/1", ["h1:6379/0", "h2:6379/1"]),
        ("redis://[::1]:7000,[::2]", ["::1:7000/0", "::2:6379/0"]),
        ("unix:///run/redis.sock?db=2,redis://h", ["/run/redis.sock#2", "h:6379/0"]),
        ("rediss://h?ssl_cert_reqs=none", ["h:6379/0"]),
        ("rediss://h?ssl_check_hostname=False&ssl_cert_reqs=optional", ["h:6379/0"]),
        (
            "redis://my_host.,xn--bcher-kva.example,b\u00fccher,redis://[fe80::1%25eth0]:7000",
            ["my_host.:6379/0", *_MORE],
        ),
        (f"redis://h/{2**31 - 1}", [f"h:6379/{2**31 - 1}"]),
        (
            "redis://localhost/1,redis://127.0.0.1/2,127.0.0.1:7000",
            ["localhost:6379/1", "127.0.0.1:6379/2", "127.0.0.1:7000/2"],
        ),
    ],
)
def test_servers_are_parsed(text: str, labels: list[str]) -> None:
    assert [target.label for target in parse_remote(text)] == labels


def test_a_bare_host_is_a_server_like_the_one_before_it() -> None:
    targets = parse_remote(f"rediss://user:{SECRET}@h1:7000/2?ssl_cert_reqs=none,h2:7001")
    assert targets[1].url == f"rediss://user:{SECRET}@h2:7001/2?ssl_cert_reqs=none"


def test_a_password_is_not_part_of_what_a_server_is_called() -> None:
    target = parse_remote(f"redis://:{SECRET}@h1")[0]
    assert SECRET not in f"{target} {target!r} {target.label}"
    assert target.label == parse_remote("redis://:other@h1")[0].label


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h1:6379",
        f"http://:{SECRET}@h1",
        f"redis//:{SECRET}@h1",
        f"redis://:{SECRET}@",
        f"redis://:{SECRET}@h1:port",
        f"redis://:{SECRET}@h1:99999",
        f"redis://:{SECRET}@h1:0",
        f"redis://:{SECRET}@h1/zero",
        f"redis://:{SECRET}#@h1",
        f"redis://u?{SECRET}@h1",
        f"redis://:{SECRET}@h1?socket_timeout=100",
        f"redis://:{SECRET}@h1?db=x",
        f"redis://:{SECRET}@h1,",
        f"redis://:{SECRET}@h1,:{SECRET}@h2",
        f"redis://:{SECRET}@h1,h2/1",
        f"redis://:{SECRET}@h1,redis://:{SECRET}@h1:6379/0",
        f"redis://:{SECRET}@[::1",
        "unix://",
        "unix://host/path",
        "unix:///run/redis.sock,h2",
    ],
)
def test_a_malformed_server_names_the_key_and_tells_no_password(text: str) -> None:
    with pytest.raises(ConfigError, match="--kv-remote") as caught:
        parse_remote(text)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"redis://:{SECRET}@a..b", r"server 1 .*'a\.\.b'.* no host's name"),
        (f"redis://:{SECRET}@h1,a..b", r"server 2 .*'a\.\.b'"),
        (f"redis://:{SECRET}@h 1", "server 1 .*'h 1'.* no host's name"),
        (f"redis://:{SECRET}@h;h2", "server 1 .*'h;h2'"),
        (f"redis://:{SECRET}@{'a' * 64}", "server 1 .* no host's name"),
        (f"redis://:{SECRET}@h\n", "line break"),
        (f"redis://:{SECRET[:3]}\n{SECRET[3:]}@h", "line break"),
        (f"redis://:{SECRET}@h/99999999999999999999", "server 1 .*database 99999999999999999999.*2147483647"),
        (f"redis://:{SECRET}@h?db={'9' * 5000}", "server 1 .*database 9+,"),
        (f"redis://:{SECRET}@h/{2**31}", "server 1 .*database"),
        (f"redis://:{SECRET}@h?db=1&db=2", "option twice"),
        (f"rediss://:{SECRET}@h?ssl_cert_reqs=foo", "ssl_cert_reqs=foo; write one of none, optional, required"),
        (f"rediss://:{SECRET}@h?ssl_check_hostname=maybe", "ssl_check_hostname=maybe; write true or false"),
        (f"rediss://:{SECRET}@h?ssl_ca_certs=/no/such/file", "ssl_ca_certs=/no/such/file, which cannot be read"),
        (f"rediss://:{SECRET}@h?ssl_ca_certs=", "ssl_ca_certs=, which cannot be read"),
        (f"rediss://:{SECRET}@h?ssl_ca_certs=/x%00", "control character"),
        ("unix:///run/redis%00.sock", "control character"),
    ],
)
def test_what_no_server_can_be_reached_by_is_refused_and_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--kv-remote.*{said}") as caught:
        parse_remote(text)
    assert SECRET not in str(caught.value)


def test_a_password_is_not_taken_for_a_host() -> None:
    """One with a comma, an @ and what no host's name has: its middle looks like a server's name."""
    with pytest.raises(ConfigError, match="--kv-remote: server 3 is not a URL") as caught:
        parse_remote(f"redis://:a@b,{SECRET}!,e@host")
    assert SECRET not in str(caught.value)


def test_the_files_of_tls_are_read_at_the_start(tmp_path: Path) -> None:
    certify(tmp_path, "one", "-nodes")
    certify(tmp_path, "other", "-nodes")
    certify(tmp_path, "locked", "-passout", "pass:secret")
    junk = tmp_path / "junk"
    junk.write_text("no certificate")

    def parsed(**files: str) -> None:
        parse_remote(f"rediss://h?{'&'.join(f'ssl_{key}={tmp_path / name}' for key, name in files.items())}")

    parsed(ca_certs="one.pem", certfile="one.pem", keyfile="one.key")
    for said, files in (
        ("ssl_ca_certs=.*junk, which holds no certificate", {"ca_certs": "junk"}),
        ("ssl_certfile=.*missing, which cannot be read", {"certfile": "missing"}),
        ("ssl_certfile=.*one.pem; that is not a certificate and its key", {"certfile": "one.pem"}),
        ("ssl_keyfile=.*other.key; that is not", {"certfile": "one.pem", "keyfile": "other.key"}),
        ("ssl_keyfile without ssl_certfile", {"keyfile": "one.key"}),
        ("locked.key.* needs a password", {"certfile": "locked.pem", "keyfile": "locked.key"}),
    ):
        with pytest.raises(ConfigError, match=f"--kv-remote: server 1 has .*{said}"):
            parsed(**files)


@pytest.mark.parametrize(
    "text",
    [
        "redis://localhost:7000,127.0.0.1:7000",
        "redis://127.0.0.1/3,redis://h2,redis://[::1]:6379?db=3",
        "rediss://localhost,redis://localhost.",
        "redis://h1,h1.",
    ],
)
def test_one_server_by_two_names_is_refused(text: str) -> None:
    """It would get twice its share of the blocks, and they would count twice."""
    with pytest.raises(ConfigError, match=r"--kv-remote: .* are one server; name each server once"):
        parse_remote(text)


@pytest.mark.parametrize("there", [True, False])
def test_the_host_tiers_folder_is_no_place_for_the_disk_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """What is kept on disk would go with the last worker."""
    (tmp_path / "shm").mkdir()
    host = tmp_path / "shm" / f"bascule-{os.getuid()}"
    if there:
        host.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(host)
    (tmp_path / "mount").symlink_to(tmp_path / "shm")
    monkeypatch.setattr(places, "host_directory", lambda _=None: host)
    monkeypatch.chdir(tmp_path)
    for directory in (host, tmp_path / "link", Path("link"), tmp_path / "mount" / host.name, Path(f"shm/{host.name}/")):
        for config in (
            StoreConfig(kv_disk=f"{directory}:1MiB"),
            StoreConfig(kv_host="1MiB", kv_disk=f"{directory}:1MiB"),
        ):
            for use in (check_stores, open_stores):
                with pytest.raises(ConfigError, match=r"--kv-disk: .* is the folder of --kv-host"):
                    use(config)
    check_stores(StoreConfig(kv_disk=f"{tmp_path / 'shm' / 'other'}:1MiB"))


def test_a_home_that_nobody_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kv-disk: nobody has the home"):
        parse_disk("~no-such-user/kv:1MiB")
    with pytest.raises(ConfigError, match="--disk: nobody has the home"):
        disk_shelf(Path("~no-such-user/kv"))


def test_the_last_to_leave_the_host_tier_gives_its_memory_back(tmp_path: Path) -> None:
    first, second = (host_store(1 << 20, tmp_path) for _ in range(2))
    name = BlockHash(bytes(16))
    first.put({name: b"kv"})
    first.close()
    assert second.get([name]) == [b"kv"]
    check_host(1 << 20, tmp_path)
    assert second.holds([name]) == [True], "looking at it is not using it"
    second.close()
    third = host_store(1 << 20, tmp_path)
    assert third.get([name]) == [None]
    third.close()


def test_all_tiers_are_checked_before_a_worker_starts(tmp_path: Path) -> None:
    check_stores(StoreConfig(kv_disk=f"{tmp_path}:1MiB", kv_remote="redis://127.0.0.1:1"))
    for config, key in (
        (StoreConfig(kv_disk=f"{tmp_path}/file/x:1MiB"), "--kv-disk"),
        (StoreConfig(kv_disk=str(tmp_path)), "--kv-disk"),
        (StoreConfig(kv_host="much"), "--kv-host"),
        (StoreConfig(kv_remote="http://host"), "--kv-remote"),
    ):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=key):
            check_stores(config)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("redis://localhost", True),
        ("redis://127.0.0.1:7000,h2", True),
        ("redis://[::1]", True),
        ("unix:///run/redis.sock", True),
        ("redis://10.0.0.1,h2", False),
    ],
)
def test_a_machines_own_server_is_not_the_next_ones(text: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    for machine in ("here", "there"):
        monkeypatch.setattr(remote, "machine_id", lambda name=machine: name)
        store = remote.RemoteStore(parse_remote(text))
        places.append(store.place)
        store.close()
    assert (places[0] != places[1]) is own


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_a_directory_without_links_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_links(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_links)
    check_stores(StoreConfig(kv_disk=f"{tmp_path}:1MiB"))
    one, other = (disk_store(DiskPlace(tmp_path, 1 << 20)) for _ in range(2))
    assert len(one.place) == 32 and one.place == other.place
    one.close()
    other.close()
    assert list((tmp_path / "v1" / "tmp").iterdir()) == []


def test_a_directory_whose_name_is_damaged_gets_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_ID_PATIENCE_S", 0.0)
    (tmp_path / "v1").mkdir()
    path = tmp_path / "v1" / "id"
    path.write_bytes(b"half")
    check_stores(StoreConfig(kv_disk=f"{tmp_path}:1MiB"))
    name = path.read_text()
    assert len(name) == 32 and folder.Folder(tmp_path, 1 << 20).identity() == name
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="--kv-disk"):
        check_stores(StoreConfig(kv_disk=f"{tmp_path}:1MiB"))


def test_a_name_that_another_has_begun_to_write_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_stores(StoreConfig(kv_disk=f"{tmp_path}:1MiB"))
    path = tmp_path / "v1" / "id"
    whole = path.read_bytes()
    path.write_bytes(whole[:5])
    monkeypatch.setattr(time, "sleep", lambda _: path.write_bytes(whole))
    assert folder.Folder(tmp_path, 1 << 20).identity() == whole.decode()


def test_a_check_evicts_nothing(tmp_path: Path) -> None:
    """What the check is made for may be refused for another reason, and a bound may be a slip of the pen."""
    store = DirectoryStore(tmp_path, 1 << 20, timeout_s=20.0)
    names = [BlockHash(bytes([number]) * 16) for number in range(8)]
    assert store.put({name: bytes(1000) for name in names}) == 8
    store.close()
    check_stores(StoreConfig(kv_disk=f"{tmp_path}:2000"))
    assert len(list(tmp_path.glob("v1/*/" + "[0-9a-f]" * 32))) == 8
