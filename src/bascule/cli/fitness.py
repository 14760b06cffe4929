"""Whether this machine is fit for what it is asked to run: `doctor` shows it, `serve`, `router` and `worker` act on it.

Each finding is one line: what, where, and how to mend it. The same line is said wherever it is found.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from msgspec import Struct

from bascule.addresses import check_ipv4
from bascule.config import (
    AttachConfig,
    EngineConfig,
    HandoffConfig,
    HardwareConfig,
    ModelConfig,
    RoutingConfig,
    SecurityConfig,
    StoreConfig,
)
from bascule.control.devices import Device
from bascule.errors import BasculeError, ConfigError
from bascule.hardware import read_hardware
from bascule.keys import ClusterKey, check_clear, is_loopback
from bascule.kv.store.places import check_stores, parse_host
from bascule.kv.store.targets import KEY as REMOTE_KEY
from bascule.kv.store.targets import parse_remote
from bascule.machine import cache_home, memory_bytes, most_open_files, raise_open_files
from bascule.models import LoadedModel
from bascule.observe.decision_log import opened
from bascule.router.policy import keeps_whole, policy_named
from bascule.types import ModelCard
from bascule.worker.card import layout_of
from bascule.worker.checks import check_codecs, check_memory, check_tiers, read_cost_model

log = logging.getLogger(__name__)

_LEAST_FILES = 256
_BASE_FILES = 128
"""Libraries, logs, sockets of a process that does nothing yet."""
_FILES_A_SEQUENCE = 8
"""A stream's handoff in and out: connections, the peer's memory, the peer's process."""
_MOST_WORKERS = 16
"""That a router of its own is expected to have."""
_LONGEST_FOLDER = 70
"""Characters, so that a Unix socket's name below fits into the kernel's 107."""
_LEAST_ROOM = 64 << 20


class Level(StrEnum):
    OK = "ok"
    DOUBT = "doubt"
    """It will run, with a loss."""
    WRONG = "wrong"


class Finding(Struct, frozen=True):
    """One thing looked at."""

    level: Level
    what: str
    mend: str = ""
    """What to do about it; empty where `what` says it."""

    @property
    def line(self) -> str:
        return f"{self.what}; {self.mend}" if self.mend else self.what


def found(good: bool, what: str, mend: str, otherwise: Level = Level.WRONG) -> Finding:
    """Fine, or `otherwise` and with what to do."""
    return Finding(Level.OK, what) if good else Finding(otherwise, what, mend)


def tried(check: Callable[[], object], what: str) -> Finding:
    """Fine if the check does not raise one of our errors, which say what to do."""
    try:
        check()
    except BasculeError as error:
        return Finding(Level.WRONG, str(error))
    return Finding(Level.OK, what)


def act_on(findings: Iterable[Finding]) -> None:
    """Warn of doubts; raises ConfigError, with its line, for the first that is wrong."""
    for finding in findings:
        if finding.level is Level.WRONG:
            raise ConfigError(finding.line)
        if finding.level is Level.DOUBT:
            log.warning("%s", finding.line)


def of_workers(engine: EngineConfig, store: StoreConfig, workers: int, *, dealt: bool = True) -> Iterator[Finding]:
    """What so many workers on this machine need; `dealt`: nobody has said which cores they are to have."""
    yield _memory(engine, store, workers)
    yield _free_memory(engine, workers)
    if dealt:
        yield _cores(workers)
    if store.tiers:
        yield tried(lambda: check_stores(store), "the tiers of the KV store can be used")
    yield _folder("the cache (BASCULE_CACHE)", cache_home(), Level.DOUBT)
    yield _sockets()
    yield _files("a worker", _BASE_FILES + _FILES_A_SEQUENCE * engine.max_sequences, "--max-sequences")


def of_gpus(devices: Sequence[Device]) -> Iterator[Finding]:
    """Whether torch can compute on those that are GPUs; nothing is said where it is missing."""
    names = sorted({f"cuda:{device.index}" for device in devices if device.kind == "cuda"})
    if names and find_spec("torch") is not None:
        from bascule.engine.torch.runner import usable_device  # takes a second, which only GPUs are worth

        yield from (tried(partial(usable_device, name), f"{name} is there") for name in names)


def of_router(
    routing: RoutingConfig, engine: EngineConfig = EngineConfig(), workers: int = _MOST_WORKERS
) -> Iterator[Finding]:
    """What the router's process needs for clients that wait and that are served, and for its policy."""
    needed = _BASE_FILES + routing.queue_limit + workers * engine.max_sequences
    yield _files("the router", needed, "--queue-limit")
    yield tried(lambda: policy_named(routing.policy, routing.balance), f"policy {routing.policy} is there")
    if (log_file := routing.decision_log) is not None:
        yield tried(lambda: os.close(opened(log_file)), f"decision-log: {log_file} can be written")


def of_handoff(routing: RoutingConfig, handoff: HandoffConfig, store: StoreConfig) -> Iterator[Finding]:
    """Whether the flags of handoffs have an effect under the policy."""
    yield tried(
        lambda: _check_handoff(routing, handoff, store), f"policy {routing.policy} goes with the handoff's flags"
    )


def of_model(
    loaded: LoadedModel, form: ModelConfig, engine: EngineConfig, handoff: HandoffConfig, store: StoreConfig
) -> Iterator[Finding]:
    """Whether workers with these settings have room for KV of this model, and can code it."""
    try:
        layout = layout_of(loaded, form, engine)
    except ConfigError as error:
        yield Finding(Level.WRONG, str(error))
        return
    tokens = engine.kv_bytes // layout.block_bytes * layout.block_size
    yield tried(
        lambda: check_memory(engine, layout), f"--kv-memory {engine.kv_memory} holds {tokens} tokens of context"
    )
    yield tried(lambda: check_tiers(engine, store, layout), "so do the tiers of the KV store, if any, hold some")
    yield tried(lambda: check_codecs(handoff, store, layout), "codecs, if any, can represent the model's KV")
    yield tried(lambda: read_cost_model(engine.cost_model), "the cost model, if any, can be read")


def of_hardware(
    config: HardwareConfig, devices: Sequence[Device], card: Callable[[], ModelCard | None]
) -> Iterator[Finding]:
    """Whether the hardware file has what workers on these devices are, and is of the model that they offer; `card` is
    asked only if there is such a file."""
    if (path := config.hardware) is None:
        return
    try:
        hardware = read_hardware(path)
        if config.worker_class is not None:
            hardware.named(config.worker_class)
        for device in devices:
            hardware.class_of(config.worker_class, device.kind, len(device.cores))
        if (offered := card()) is not None:
            hardware.require_model(offered.name, offered.fingerprint, path)
    except BasculeError as error:
        yield Finding(Level.WRONG, str(error))
    else:
        yield Finding(Level.OK, f"the hardware file {path} knows such workers")


def of_clear(
    key: ClusterKey | None, security: SecurityConfig, store: StoreConfig, attach: AttachConfig = AttachConfig()
) -> Iterator[Finding]:
    """Servers on other machines that prompts, or KV, would go to in clear though the cluster has a key.

    Raises ConfigError for a malformed URL. A name is looked up, which may take a while.
    """
    addresses: list[tuple[str, str, str]] = []
    for target in parse_remote(store.kv_remote) if store.kv_remote is not None else ():
        if (host := target.clear_host) is not None:
            addresses.append((f"{REMOTE_KEY} {target.label}", host, "a rediss:// URL"))
    for url in attach.urls:
        if (parts := urlsplit(url)).scheme == "http":
            addresses.append((f"--attach {url}", parts.hostname or "", "an https:// URL"))
    for what, host, instead in addresses if key is not None else ():
        try:
            doubt = check_clear(key, security.insecure, what, is_loopback(host), instead)
        except ConfigError as error:
            yield Finding(Level.WRONG, str(error))
        else:
            yield Finding(Level.DOUBT, doubt) if doubt else Finding(Level.OK, f"{what} stays on this machine")


def check_advertised(host: str) -> None:
    """Raises ConfigError where `--host` of a worker is no address that a peer could connect to."""
    bare = host.strip("[]")
    try:
        numeric = socket.getaddrinfo(bare, None, flags=socket.AI_NUMERICHOST)[0][4][0]
        everywhere = ipaddress.ip_address(numeric).is_unspecified
    except (OSError, ValueError):
        everywhere = bare in ("", "*")
    if everywhere:
        raise ConfigError(
            f"--host {host or repr(host)} is no address that peers can connect to; give the one of this machine that "
            "they reach, such as 10.0.0.2"
        )
    check_ipv4(f"--host {host}", host)


def _check_handoff(routing: RoutingConfig, handoff: HandoffConfig, store: StoreConfig) -> None:
    """Raises ConfigError for flags of a handoff that could have no effect."""
    if routing.handoff != "push" and not store.tiers:
        raise ConfigError(f"--handoff {routing.handoff} needs a KV store; give --kv-host, --kv-disk or --kv-remote")
    if not keeps_whole(routing.policy):
        return
    why = f"has no effect under policy {routing.policy}, which hands nothing over; leave it out, or use another policy"
    if routing.handoff != "push":
        raise ConfigError(f"--handoff {routing.handoff} {why}")
    if handoff.transfer_codec != "none" and (routing.policy == "single" or not handoff.peer_fetch):
        raise ConfigError(f"--transfer-codec {handoff.transfer_codec} {why}")


def _memory(engine: EngineConfig, store: StoreConfig, workers: int) -> Finding:
    asked = workers * engine.kv_bytes + (parse_host(store.kv_host) if store.kv_host is not None else 0)
    memory = memory_bytes()
    host = "" if store.kv_host is None else f" and --kv-host {store.kv_host}"
    which = f"--kv-memory {engine.kv_memory} for each of {workers} workers{host}"
    if workers and asked > memory:
        return Finding(Level.WRONG, f"{which} are more than this machine's memory of {memory} bytes", "ask for less")
    return Finding(Level.OK, f"{which}: {memory / 2**30:.1f} GiB of memory")


def _free_memory(engine: EngineConfig, workers: int) -> Finding:
    asked, free = workers * engine.kv_bytes, psutil.virtual_memory().available
    return found(
        free > asked,
        f"{free / 2**30:.1f} GiB of memory are free for {asked / 2**30:.1f} GiB of KV blocks",
        "give less with --kv-memory, or stop something",
        Level.DOUBT,
    )


def _cores(workers: int) -> Finding:
    cores = len(os.sched_getaffinity(0))
    what = f"{cores} usable cores for {workers} workers"
    return found(workers <= cores, what, "they share cores: run fewer (--policy single runs one)", Level.DOUBT)


def _folder(what: str, folder: Path, otherwise: Level = Level.WRONG) -> Finding:
    """A directory that is ours to write to, or can be made, with some room."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    mend = "give another, or make it writable for this user"
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding(otherwise, f"{what} cannot be written: {folder}", mend)
    free = shutil.disk_usage(there).free
    return found(free >= _LEAST_ROOM, f"{what}: {folder} has {free >> 20} MiB free", "make room there", otherwise)


def _sockets() -> Finding:
    """KV over shared memory is arranged over Unix sockets in the directory for temporary files."""
    mend = "set TMPDIR to a directory of yours with a short name"
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        return Finding(Level.WRONG, f"no directory for temporary files can be written: {error.strerror}", mend)
    return found(len(os.fsencode(folder)) <= _LONGEST_FOLDER, f"sockets for shared memory go to {folder}", mend)


def _files(whose: str, needed: int, flag: str) -> Finding:
    raise_open_files(needed)
    allowed = most_open_files()
    return found(
        allowed >= needed,
        f"{allowed} open files are allowed here, {needed} are what {whose} may need at its fullest",
        f"allow more (ulimit -Hn {needed}, or LimitNOFILE={needed} of its service), or ask for less with {flag}",
        Level.DOUBT if allowed >= _LEAST_FILES else Level.WRONG,
    )
