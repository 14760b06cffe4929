"""`bascule worker`: one worker that joins a router."""

from __future__ import annotations

import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from bascule.addresses import check_address
from bascule.cli.fitness import act_on, check_advertised, of_clear, of_hardware, of_workers
from bascule.cli.keys import cluster_key_of
from bascule.config import (
    EngineConfig,
    HandoffConfig,
    HardwareConfig,
    ModelConfig,
    SecurityConfig,
    SloConfig,
    StoreConfig,
)
from bascule.control.devices import parse_device
from bascule.errors import ConfigError
from bascule.keys import check_open, is_loopback, stays_here
from bascule.models import load
from bascule.types import Role, WorkerId
from bascule.worker.card import offered_card
from bascule.worker.process import WorkerSettings, run

log = logging.getLogger(__name__)

Flat = Parameter(name="*")


def check_id(id: str) -> None:
    """Raises ConfigError for what a worker may not be called."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", id):
        raise ConfigError(f"--id {id!r}: use 1 to 64 letters, digits, dots, dashes or underscores")


def worker(
    model: str = "smollm2",
    /,
    *,
    join: str,
    id: str,
    role: Role = Role.MIXED,
    device: str = "cpu",
    host: str = "127.0.0.1",
    parent: Annotated[int | None, Parameter(show=False)] = None,
    log_level: str = "info",
    model_config: Annotated[ModelConfig, Flat] = ModelConfig(),
    engine_config: Annotated[EngineConfig, Flat] = EngineConfig(),
    handoff_config: Annotated[HandoffConfig, Flat] = HandoffConfig(),
    slo_config: Annotated[SloConfig, Flat] = SloConfig(),
    store_config: Annotated[StoreConfig, Flat] = StoreConfig(),
    security_config: Annotated[SecurityConfig, Flat] = SecurityConfig(),
    hardware_config: Annotated[HardwareConfig, Flat] = HardwareConfig(),
    config: Path | None = None,
) -> None:
    """Run one worker and join a router.

    Example: bascule worker smollm2 --join tcp://127.0.0.1:8100 --id decode-0 --role decode --device cpu:1

    Parameters
    ----------
    model
        `smollm2`, a directory in Hugging Face format, a GGUF file or a hub id; the same as the router's.
    join
        Address of the router's worker socket, as it prints it.
    id
        Name of this worker, unique in the cluster.
    role
        What this worker is asked to do.
    device
        `cpu:0`, `cpu:0+1` (two cores), `cpu` (all cores) or `cuda:0`.
    host
        Address that peers reach this worker at.
    log_level
        debug, info, warning or error.
    config
        TOML file with the same keys as these flags.
    """
    logging.basicConfig(level=log_level.upper(), format=f"%(asctime)s {id} %(levelname)s %(message)s")
    check_id(id)
    check_address("--join", join)
    key = cluster_key_of(security_config)
    for what, stays in ((f"--host {host}", is_loopback(host)), (f"--join {join}", stays_here(join))):
        if doubt := check_open(key, security_config.insecure, what, stays):
            log.warning("%s", doubt)
    if key is not None:
        log.info("with the cluster key, messages and KV over TCP are encrypted, and nobody without it is let in")
    check_advertised(host)
    place = parse_device(device)
    if parent is None:  # else the launcher has looked
        act_on(of_workers(engine_config, store_config, 1))
        act_on(of_clear(key, security_config, store_config))
        settings = (model_config, engine_config, handoff_config, store_config)
        act_on(of_hardware(hardware_config, [place], lambda: offered_card(model, load(model), *settings)))
    run(
        WorkerSettings(
            model=model,
            join=join,
            worker=WorkerId(id),
            role=role,
            device_kind=place.kind,
            device_index=place.index,
            cores=place.cores,
            device_name=str(place),
            host=host,
            model_config=model_config,
            engine_config=engine_config,
            handoff_config=handoff_config,
            slo_config=slo_config,
            store_config=store_config,
            hardware_config=hardware_config,
            key=key,
            parent=parent,
        )
    )


def flags_of(*structs: Any) -> tuple[str, ...]:
    """Config structs as the command line flags that make them again; defaults are left out."""
    flags: list[str] = []
    for struct in structs:
        for field in fields(struct):
            value = getattr(struct, field.name)
            name = field.name.replace("_", "-")
            if value == field.default:
                continue
            if isinstance(value, bool):
                flags.append(f"--{name}" if value else f"--no-{name}")
            else:
                flags.append(f"--{name}={value}")
    return tuple(flags)
