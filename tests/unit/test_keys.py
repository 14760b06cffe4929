"""Cluster keys and private files: who can read them, what is refused, and which addresses need a key."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import zmq

from bascule.errors import ConfigError
from bascule.keys import (
    ClusterKey,
    check_clear,
    check_open,
    is_loopback,
    read_cluster_key,
    read_private,
    stays_here,
    write_cluster_key,
    write_private,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cluster.key"


def test_a_new_key_is_its_owners_alone_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        write_cluster_key(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_each_key_is_another_and_all_who_read_one_derive_the_same(path: Path) -> None:
    write_cluster_key(path)
    write_cluster_key(other := path.with_name("other"))
    key = read_cluster_key(path)
    assert key == read_cluster_key(path) != read_cluster_key(other)
    assert zmq.curve_public(key.server_secret) == key.server_public
    assert zmq.curve_public(key.client_secret) == key.client_public
    assert len({key.server_secret, key.client_secret}) == 2


def test_what_is_derived_stays_the_same_from_version_to_version() -> None:
    """Machines of one cluster may be updated one after the other."""
    key = ClusterKey.of(bytes(range(32)))
    assert (key.server_public, key.client_public) == (
        b"KMqpq]Q(dOKMUlo-TQX4>y08>7NO:96[dSSZF%@7",
        b"eDP$:7Lo4cRpFZa}FAI@=T(H=8-^Y{</C6)J!x?]",
    )


def test_a_key_in_use_is_not_overwritten(path: Path) -> None:
    write_cluster_key(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="there already"):
        write_cluster_key(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with pytest.raises(ConfigError, match="cannot write"):
        write_cluster_key(path / "below")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_can_read_is_refused_with_the_remedy(path: Path, mode: int) -> None:
    write_cluster_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode 0{mode:o}.*chmod 600 {path}"):
        read_cluster_key(path)


@pytest.mark.parametrize("content", ["", "bascule-cluster-key-1 00", "bascule-cluster-key-1 " + "z" * 64, "ab" * 32])
def test_a_file_that_is_no_key_is_refused_and_its_content_not_told(path: Path, content: str) -> None:
    write_private(path, content.encode())
    with pytest.raises(ConfigError, match=r"holds no cluster key.*bascule cluster-key") as caught:
        read_cluster_key(path)
    assert not content or content not in str(caught.value)


def test_files_that_are_no_text_too_long_or_not_there_are_named(path: Path) -> None:
    for content in (b"\xff\xfe", b"a" * 100_000):
        write_private(path, content)
        with pytest.raises(ConfigError, match=r"--flag: .*cluster.key is no text"):
            read_private(path, "--flag")
    with pytest.raises(ConfigError, match="No such file"):
        read_private(path / "x" if path.is_dir() else path.with_name("none"), "--flag")


def test_a_key_may_come_through_a_pipe(path: Path) -> None:
    """As shells make them: `--cluster-key-file <(...)`."""
    write_cluster_key(path)
    pipe = path.with_name("pipe")
    os.mkfifo(pipe, 0o644)
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    assert read_cluster_key(pipe) == read_cluster_key(path)
    writer.join(10)


def test_neither_a_key_nor_its_errors_show_secrets() -> None:
    key = ClusterKey.of(b"s" * 32)
    assert key.server_secret.decode() not in repr(key) and key.client_secret.decode() not in repr(key)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host) and stays_here(f"tcp://{host}:8100")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "10.0.0.1", "192.0.2.1", "eth0", "", "no such host"])
def test_everything_else_needs_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert not is_loopback(host) and not stays_here(f"tcp://{host}:8100")


def test_sockets_in_the_file_system_stay_here() -> None:
    assert stays_here("ipc:///tmp/x") and not stays_here("epgm://eth0;239.1.1.1:5555")


def test_without_a_key_a_plane_opens_only_where_somebody_says_so() -> None:
    key = ClusterKey.of(b"s" * 32)
    with pytest.raises(ConfigError, match=r"--host 10.0.0.1 .*bascule cluster-key.*--cluster-key-file.*--insecure"):
        check_open(None, False, "--host 10.0.0.1", stays=False)
    assert "--host x" in (check_open(None, True, "--host x", stays=False) or "")
    assert check_open(None, False, "--host x", stays=True) is None
    assert check_open(key, False, "--host x", stays=False) is None


def test_a_cluster_with_a_key_sends_nothing_in_clear_unless_somebody_says_so() -> None:
    key, ask = ClusterKey.of(b"s" * 32), "a rediss:// URL"
    with pytest.raises(ConfigError, match=r"^--kv-remote kv1 .*in clear.*give a rediss:// URL, or --insecure in a"):
        check_clear(key, False, "--kv-remote kv1", False, ask)
    allowed = check_clear(key, True, "--kv-remote kv1", False, ask)
    assert allowed is not None and "--kv-remote kv1" in allowed and "in clear" in allowed
    assert check_clear(key, False, "--kv-remote kv1", True, ask) is None
    assert check_clear(None, False, "--kv-remote kv1", False, ask) is None, "without a key nothing is closed"
