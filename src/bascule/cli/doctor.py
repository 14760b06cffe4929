"""`bascule doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

from bascule.addresses import check_address
from bascule.api.server import check_port
from bascule.cli.fitness import (
    Finding,
    Level,
    check_advertised,
    of_clear,
    of_gpus,
    of_handoff,
    of_hardware,
    of_model,
    of_router,
    of_workers,
    tried,
)
from bascule.cli.joining import joining
from bascule.cli.keys import admin_keys, api_keys, cluster_key_of, doubts, tls_of
from bascule.cli.outside import of_servers
from bascule.cli.report import JsonTarget, write_json
from bascule.cli.serve import plan_workers
from bascule.cli.worker import Flat, check_id
from bascule.config import (
    AttachConfig,
    EngineConfig,
    HandoffConfig,
    HardwareConfig,
    HttpConfig,
    ModelConfig,
    PoolConfig,
    RoutingConfig,
    SecurityConfig,
    SloConfig,
    StoreConfig,
)
from bascule.control.devices import Device, deal_out
from bascule.engine.native import build
from bascule.errors import BasculeError, ConfigError
from bascule.keys import check_open, is_loopback, stays_here
from bascule.models import LoadedModel, catalog, load
from bascule.native import NativeUnavailable
from bascule.types import ModelCard
from bascule.worker.card import offered_card

_ENGINE_MODULES = ("torch", "safetensors")


def doctor(
    model: str = "smollm2",
    /,
    *,
    workers: int | None = None,
    join: str | None = None,
    id: str | None = None,
    json: JsonTarget = None,
    pools: Annotated[PoolConfig, Flat] = PoolConfig(),
    routing: Annotated[RoutingConfig, Flat] = RoutingConfig(),
    http: Annotated[HttpConfig, Flat] = HttpConfig(),
    model_config: Annotated[ModelConfig, Flat] = ModelConfig(),
    engine_config: Annotated[EngineConfig, Flat] = EngineConfig(),
    handoff_config: Annotated[HandoffConfig, Flat] = HandoffConfig(),
    slo_config: Annotated[SloConfig, Flat] = SloConfig(),
    attach_config: Annotated[AttachConfig, Flat] = AttachConfig(),
    store_config: Annotated[StoreConfig, Flat] = StoreConfig(),
    security_config: Annotated[SecurityConfig, Flat] = SecurityConfig(),
    hardware_config: Annotated[HardwareConfig, Flat] = HardwareConfig(),
    config: Path | None = None,
) -> None:
    """Check this machine for what `serve` would run with the same flags, or with --join for a worker; exit code 1 if
    something is in the way.

    Examples: bascule doctor smollm2 --workers 2,
    or on a worker's host: bascule doctor smollm2 --join tcp://10.0.0.1:8100 --host 10.0.0.2 --cluster-key-file FILE

    Parameters
    ----------
    model
        The model that you want to serve.
    workers
        How many workers are to run here (default: as `serve` runs, or one with --join).
    join
        Address of a router that a worker here is to join; then --host is where its peers are to reach it.
    id
        With --join: the name that the worker is to have.
    json
        File to write the findings to as JSON (`-` for standard output, instead of the lines).
    config
        TOML file with the same keys as these flags.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} must be 1 or more")
    if id is not None and join is None:
        raise ConfigError(f"--id {id} is for a worker that joins a router; give --join, or leave it out")
    if id is not None:
        check_id(id)
    logging.disable(logging.CRITICAL)  # all there is to say is in the findings
    settings = (model_config, engine_config, handoff_config, store_config)
    loaded, said = _looked_up(model)
    findings = [*_software(engine_config), said]
    offered = cache(lambda: None if loaded is None else offered_card(model, loaded, *settings))
    devices: list[Device] = []
    if join is not None:
        findings += of_workers(engine_config, store_config, workers or 1)
        findings += _attempt(lambda: _joining(join, http.host, security_config, offered, id))
    else:
        devices, wrong = _devices(workers, pools, routing, attached=len(attach_config.urls))
        findings += wrong or of_workers(engine_config, store_config, len(devices), dealt=pools.devices is None)
        findings += of_gpus(devices if engine_config.engine == "torch" else ())
        findings += of_router(routing, engine_config, len(devices))
        findings += of_handoff(routing, handoff_config, store_config)
        findings += _attempt(lambda: _planes(http, security_config))
    if loaded is not None and (devices or join is not None):
        findings += of_model(loaded, *settings)
    findings += of_hardware(hardware_config, devices, offered)
    findings += _attempt(lambda: _clear(security_config, store_config, attach_config))
    findings += _attempt(lambda: of_servers(store_config, attach_config, model_config.model_name or model))
    if json is not None:
        write_json([{"level": each.level, "what": each.what, "mend": each.mend} for each in findings], json)
    if json != "-":
        for finding in findings:
            print(f"{finding.level.upper():<5}  {finding.line}")
    if any(finding.level is Level.WRONG for finding in findings):
        sys.exit(1)


def _attempt(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What is found until one of our errors ends it, which is a finding too."""
    try:
        yield from look()
    except BasculeError as error:
        yield Finding(Level.WRONG, str(error))


def _devices(
    workers: int | None, pools: PoolConfig, routing: RoutingConfig, *, attached: int
) -> tuple[list[Device], list[Finding]]:
    """Those of the workers that are to run here; none where they cannot run so, which is a finding."""
    try:
        if workers is not None:
            return deal_out(pools.devices, workers), []
        return [plan.device for plan in plan_workers(pools, routing, (), attached=attached)], []
    except ConfigError as error:
        return [], [Finding(Level.WRONG, str(error))]


def _software(engine: EngineConfig) -> Iterator[Finding]:
    yield Finding(Level.OK, f"Python {sys.version.split()[0]}")
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    yield Finding(Level.OK, f"{len(os.sched_getaffinity(0))} usable cores, {' '.join(extensions) or 'no AVX'}")
    if engine.engine == "mock":
        return
    for name in _ENGINE_MODULES:
        there = importlib.util.find_spec(name) is not None
        mend = "" if there else "workers need it: pip install 'bascule[engine]'"
        yield Finding(Level.OK if there else Level.WRONG, f"package {name}{'' if there else ' is missing'}", mend)
    yield _kernels()


def _kernels() -> Finding:
    """Whether bfloat16 is computed by compiled kernels; torch does it too, so this is never in the way."""
    try:
        build.load()
    except NativeUnavailable as unavailable:
        what = "no native kernels: bfloat16 is computed by torch, several times slower"
        return Finding(Level.DOUBT, what, str(unavailable))
    return Finding(Level.OK, "native kernels for bfloat16 and 4-bit weights")


def _looked_up(model: str) -> tuple[LoadedModel | None, Finding]:
    """The model, if it is on this machine, and what is to be said of it."""
    if any(entry.name == model and entry.state is not catalog.FileState.READY for entry in catalog.installed()):
        what = f"model {model} is not on this machine yet"
        return None, Finding(Level.DOUBT, what, f"get it: bascule models pull {model}")
    try:
        loaded = load(model)
    except BasculeError as error:
        return None, Finding(Level.WRONG, str(error))
    said = f"{loaded.spec.architecture}, {loaded.spec.layers} layers, context {loaded.spec.context}"
    return loaded, Finding(Level.OK, f"model {model}: {said}")


def _planes(http: HttpConfig, security: SecurityConfig) -> Iterator[Finding]:
    """Ports, keys and certificates of the router's process."""
    yield tried(lambda: asyncio.run(check_port(http.host, http.port)), f"the API can listen on {http.host}:{http.port}")
    yield tried(lambda: asyncio.run(check_port("127.0.0.1", http.admin_port)), "so can the admin API on loopback")
    yield tried(lambda: cluster_key_of(security), "the cluster key, if there is one, is readable by its owner alone")
    yield tried(lambda: tls_of(http), "certificate and key, if any, go together")
    keys, admin = api_keys(http), admin_keys(http)
    yield Finding(Level.OK, "API and admin keys, if any, can be used")
    for doubt in doubts(http, keys, admin):
        yield Finding(Level.DOUBT, doubt)


def _clear(security: SecurityConfig, store: StoreConfig, attach: AttachConfig) -> Iterator[Finding]:
    try:
        key = cluster_key_of(security)
    except ConfigError:
        return  # said where keys are looked at
    yield from of_clear(key, security, store, attach)


def _joining(
    join: str, host: str, security: SecurityConfig, offered: Callable[[], ModelCard | None], name: str | None
) -> Iterator[Finding]:
    check_address("--join", join)
    key = cluster_key_of(security)
    for what, stays in ((f"--host {host}", is_loopback(host)), (f"--join {join}", stays_here(join))):
        if doubt := check_open(key, security.insecure, what, stays):
            yield Finding(Level.DOUBT, doubt)
    check_advertised(host)
    yield from asyncio.run(joining(join, host, key, offered(), name))
