"""Findings about this machine: each that is wrong, once, with its line; and what commands do about them."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from bascule import machine
from bascule.api.server import check_port
from bascule.cli import fitness
from bascule.cli.fitness import Finding, Level, act_on, check_advertised, of_clear, of_router, of_workers, tried
from bascule.config import AttachConfig, EngineConfig, RoutingConfig, SecurityConfig, StoreConfig
from bascule.errors import ConfigError
from bascule.keys import ClusterKey
from bascule.kv.store import places

CORES = len(os.sched_getaffinity(0))
FIT = EngineConfig(kv_memory="1MiB")


def bad(engine: EngineConfig = FIT, store: StoreConfig = StoreConfig(), workers: int = 1) -> list[tuple[Level, str]]:
    return [(each.level, each.line) for each in of_workers(engine, store, workers) if each.level is not Level.OK]


def only(found: list[tuple[Level, str]], level: Level, *words: str) -> None:
    [(is_level, line)] = found
    assert is_level is level and "\n" not in line
    for word in words:
        assert word in line


def test_a_machine_that_has_what_is_asked_for_is_fit() -> None:
    assert bad() == []
    assert all(each.level is Level.OK for each in of_router(RoutingConfig()))


def test_a_policy_and_a_log_that_are_not_there_are_wrong() -> None:
    routing = RoutingConfig(policy="nosuch.mod:f", decision_log=Path("/nowhere/log"))
    wrong = [each for each in of_router(routing) if each.level is Level.WRONG]
    assert [word in each.line for each, word in zip(wrong, ("nosuch", "/nowhere/log"), strict=True)] == [True, True]


def test_more_memory_than_there_is_is_wrong_and_more_than_is_free_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, free = bad(EngineConfig(kv_memory="900TiB"), workers=1)
    only([wrong], Level.WRONG, "--kv-memory 900TiB for each of 1 workers are more than this machine's memory", "less")
    only([free], Level.DOUBT, "GiB of memory are free for 921600.0 GiB of KV blocks", "--kv-memory")
    monkeypatch.setattr(fitness, "memory_bytes", lambda: 1 << 20)
    two = [each for each in bad(workers=2) if each[0] is Level.WRONG]
    only(two, Level.WRONG, "of 1048576 bytes; ask for less")
    with pytest.raises(ConfigError, match="ask for less"):
        act_on(of_workers(FIT, StoreConfig(kv_host="1MiB"), 1))


def test_a_container_has_the_memory_of_the_tightest_group_around_it(tmp_path: Path) -> None:
    membership, groups = tmp_path / "cgroup", tmp_path / "groups"
    inner = groups / "pod" / "ours"
    inner.mkdir(parents=True)
    (groups / "memory" / "docker").mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("4000\n")
    (groups / "memory" / "docker" / "memory.limit_in_bytes").write_text("3000\n")
    membership.write_text("0::/pod/ours\n")
    assert list(machine._limits(membership, groups)) == [4000]
    membership.write_text("5:cpu:/docker\n4:memory:/docker\n")
    assert list(machine._limits(membership, groups)) == [3000]
    assert list(machine._limits(tmp_path / "none", groups)) == []
    assert 0 < machine.memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_workers_that_share_cores_are_doubted_unless_told_where_to_run() -> None:
    only(bad(workers=CORES + 1), Level.DOUBT, f"{CORES} usable cores for {CORES + 1} workers", "--policy single")
    assert all(each.level is Level.OK for each in of_workers(FIT, StoreConfig(), CORES + 1, dealt=False))


def test_tiers_that_cannot_be_used_are_named_by_their_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(
        bad(store=StoreConfig(kv_disk="/dev/null/kv:1MiB")), Level.WRONG, "--kv-disk: /dev/null/kv", "give a directory"
    )
    room = places.shutil.disk_usage("/dev/shm")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: room._replace(free=64 << 20))
    found = tried(lambda: places.check_host(1 << 30, tmp_path), "")
    only(
        [(found.level, found.line)],
        Level.WRONG,
        "--kv-host: 1073741824 bytes are more than the 67108864",
        "ask for less",
    )


def test_folders_that_cannot_be_written_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BASCULE_CACHE", "/dev/null/cache")
    only(bad(), Level.DOUBT, f"the cache (BASCULE_CACHE) cannot be written: {machine.cache_home()}", "writable")
    monkeypatch.delenv("BASCULE_CACHE")
    deep = tmp_path / ("d" * 80)
    monkeypatch.setattr(fitness.tempfile, "gettempdir", lambda: str(deep))
    only(bad(), Level.WRONG, "sockets for shared memory", str(deep), "TMPDIR")


def test_too_few_open_files_are_a_doubt_and_far_too_few_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "raise_open_files", lambda _: None)
    for allowed, level in ((300, Level.DOUBT), (200, Level.WRONG)):
        monkeypatch.setattr(fitness, "most_open_files", lambda allowed=allowed: allowed)
        only(bad(), level, f"{allowed} open files are allowed here, 640 are what a worker may need", "ulimit -Hn 640")
        router = next(of_router(RoutingConfig(queue_limit=512), FIT, workers=2))
        only([(router.level, router.line)], level, "768 are what the router may need", "--queue-limit")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = tried(lambda: asyncio.run(check_port("127.0.0.1", port)), "")
    only([(found.level, found.line)], Level.WRONG, f"port {port} on 127.0.0.1 is in use", "--port")


def clear(store: str = "", attach: str = "", insecure: bool = False, key: bool = True) -> list[tuple[Level, str]]:
    """What is found of servers elsewhere in a cluster with (or without) a key, fine ones left out."""
    found = of_clear(
        ClusterKey.of(b"s" * 32) if key else None,
        SecurityConfig(insecure=insecure),
        StoreConfig(kv_remote=store or None),
        AttachConfig(attach=attach or None),
    )
    return [(each.level, each.line) for each in found if each.level is not Level.OK]


def test_with_a_cluster_key_a_store_on_another_machine_needs_tls() -> None:
    elsewhere = "redis://:a-password@192.0.2.1:7000/2"
    only(clear(elsewhere), Level.WRONG, "--kv-remote 192.0.2.1:7000/2", "in clear", "rediss://", "--insecure")
    only(clear(elsewhere, insecure=True), Level.DOUBT, "--kv-remote 192.0.2.1:7000/2", "in clear")
    assert "a-password" not in str(clear(elsewhere))
    assert clear(elsewhere, key=False) == []
    assert clear("rediss://192.0.2.1,unix:///run/redis.sock,redis://127.0.0.1") == []
    two = clear("redis://127.0.0.1,192.0.2.1,192.0.2.2")
    assert [line.split()[1] for _, line in two] == ["192.0.2.1:6379/0", "192.0.2.2:6379/0"], "bare hosts count, too"


def test_with_a_cluster_key_an_attached_server_on_another_machine_needs_tls() -> None:
    elsewhere = "http://192.0.2.1:8000"
    only(clear(attach=elsewhere), Level.WRONG, f"--attach {elsewhere}", "in clear", "https://", "--insecure")
    only(clear(attach=elsewhere, insecure=True), Level.DOUBT, f"--attach {elsewhere}", "in clear")
    assert clear(attach=elsewhere, key=False) == []
    assert clear(attach="https://192.0.2.1:8000,http://localhost:8000,http://[::1]:8000") == []


@pytest.mark.parametrize("host", ["0.0.0.0", "0", "0x0", "*", "", "::", "[::]"])
def test_an_address_that_nobody_can_connect_to_is_not_advertised(host: str) -> None:
    with pytest.raises(ConfigError, match="no address that peers can connect to; give the one of this machine") as told:
        check_advertised(host)
    assert str(told.value).startswith("--host " + (host or "''"))
    for fine in ("127.0.0.1", "10.0.0.2", "gpu1", "eth0"):
        check_advertised(fine)


def test_doubts_are_logged_and_what_is_wrong_ends_the_command_with_the_same_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    doubt = Finding(Level.DOUBT, "little", "have more")
    with pytest.raises(ConfigError, match=r"^nothing; have some$"):
        act_on([Finding(Level.OK, "fine"), doubt, Finding(Level.WRONG, "nothing", "have some")])
    assert [record.message for record in caplog.records] == [doubt.line] == ["little; have more"]
