"""`bascule serve`: a router and its workers on this machine, from one command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

import uvloop
from cyclopts import Parameter

from bascule.cli.fitness import act_on, of_clear, of_handoff, of_hardware, of_model, of_router, of_workers
from bascule.cli.frontend import Frontend, first_of
from bascule.cli.keys import cluster_key_of
from bascule.cli.models import pull_with_progress
from bascule.cli.screen import begin_log
from bascule.cli.screen import screen as console
from bascule.cli.worker import Flat, flags_of
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
from bascule.control.actuators.process import ProcessActuator, WorkerPlan
from bascule.control.devices import deal_out
from bascule.errors import ConfigError
from bascule.hardware import read_hardware
from bascule.keys import ClusterKey
from bascule.link_wire import LINK_TRANSPORTS
from bascule.models import LoadedModel, catalog, load
from bascule.router.policy import lacking
from bascule.types import LinkCost, Role, WorkerId
from bascule.worker.card import offered_card

_JOIN = "tcp://127.0.0.1:*"
_SPLIT, _WHOLE = (1, 1, 0), (0, 0, 2)
_DEFAULT_POOLS = {"single": (0, 0, 1), "disaggregated": _SPLIT, "thresholds": _SPLIT}
"""Prefill, decode and mixed workers; two mixed ones for all other policies."""


def serve(
    model: str = "smollm2",
    /,
    *,
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
    config: Annotated[Path | None, Parameter()] = None,
) -> None:
    """Serve a model from this machine over an OpenAI-compatible API.

    Example: bascule serve smollm2 --policy disaggregated --prefill 1 --decode 1

    Parameters
    ----------
    model
        `smollm2`, a directory in Hugging Face format, a GGUF file or a hub id.
    config
        TOML file with the same keys as these flags.
    """
    begin_log(http.log_level, "router")
    workers = len(plan_workers(pools, routing, (), attached=len(attach_config.urls)))
    act_on(of_workers(engine_config, store_config, workers, dealt=pools.devices is None))
    act_on(of_router(routing, engine_config, workers))
    act_on(of_handoff(routing, handoff_config, store_config))
    key = cluster_key_of(security_config)
    act_on(of_clear(key, security_config, store_config, attach_config))
    told = flags_of(
        model_config, engine_config, handoff_config, slo_config, store_config, security_config, hardware_config
    )
    with _private_flags(kv_remote=store_config.kv_remote) as private:
        public = (flag for flag in told if not flag.startswith("--kv-remote="))
        flags = (f"--log-level={http.log_level}", *public, *private)
        plans = plan_workers(pools, routing, flags, attached=len(attach_config.urls))
        if model in catalog.CATALOG:
            pull_with_progress(model)
        loaded = load(model)
        if plans:
            act_on(of_model(loaded, model_config, engine_config, handoff_config, store_config))
        offered = partial(offered_card, model, loaded, model_config, engine_config, handoff_config, store_config)
        act_on(of_hardware(hardware_config, [plan.device for plan in plans], offered))
        links = known_links(hardware_config, plans, handoff_config.transfer)
        deployment = Deployment(
            model, loaded, plans, pools, routing, http, model_config, slo_config, attach_config, key, links
        )
        uvloop.run(deployment.run())


@contextmanager
def _private_flags(**values: str | None) -> Iterator[tuple[str, ...]]:
    """Flags for workers whose values, passwords perhaps, must not be in the list of processes: a config file's path."""
    given = {name.replace("_", "-"): value for name, value in values.items() if value is not None}
    if not given:
        yield ()
        return
    with NamedTemporaryFile("w", prefix="bascule-", suffix=".toml") as file:
        file.writelines(f"{name} = {json.dumps(value)}\n" for name, value in given.items())
        file.flush()
        yield ("--config", file.name)


def plan_workers(
    pools: PoolConfig, routing: RoutingConfig, flags: tuple[str, ...], attached: int = 0
) -> list[WorkerPlan]:
    """Ids, roles and devices of the workers asked for, beside so many attached servers.

    Raises ConfigError where the policy cannot use them.
    """
    counts = dict(zip(Role, _DEFAULT_POOLS.get(routing.policy, _WHOLE), strict=True))
    asked = {Role.PREFILL: pools.prefill, Role.DECODE: pools.decode, Role.MIXED: pools.mixed}
    if any(count is not None for count in asked.values()):
        counts = {role: asked[role] or 0 for role in Role}
    total = sum(counts.values()) + attached
    if total == 0:
        raise ConfigError("no workers asked for; give --prefill and --decode, or --mixed, or --attach")
    if routing.policy == "single" and total != 1:
        raise ConfigError(f"policy single runs 1 worker, not {total}; use --policy replicated")
    if total == attached:
        return []
    if lacking(routing.policy, [role for role in Role if counts[role]]):
        raise ConfigError("policy disaggregated needs at least one --prefill and one --decode worker")
    names = [(role, index) for role in Role for index in range(counts[role])]
    devices = deal_out(pools.devices, len(names))
    return [
        WorkerPlan(WorkerId(f"{role.value}-{index}"), role, device, flags)
        for (role, index), device in zip(names, devices, strict=True)
    ]


def known_links(
    config: HardwareConfig, plans: Sequence[WorkerPlan], transfer: str
) -> dict[tuple[WorkerId, WorkerId], LinkCost]:
    """What the hardware file says of links between these workers, which share this machine: of the two themselves, or
    of their classes, or else of those within a machine on the whole.

    Raises ConfigError for a file that has no class for one of them.
    """
    if config.hardware is None:
        return {}
    hardware = read_hardware(config.hardware)
    ways = LINK_TRANSPORTS if transfer == "auto" else (transfer,)
    names: dict[WorkerId, tuple[str, ...]] = {}
    for plan in plans:
        device = plan.device
        found = hardware.class_of(config.worker_class, device.kind, len(device.cores))
        names[plan.worker] = (plan.worker, found.name or "")
    typical = hardware.typical(same_machine=True, transports=ways)
    costs: dict[tuple[WorkerId, WorkerId], LinkCost] = {}
    for source, target in permutations(names, 2):
        link = hardware.link(names[source], names[target], *ways)
        if (cost := link.cost if link is not None and link.same_machine else typical) is not None:
            costs[source, target] = cost
    return costs


class Deployment:
    """One `serve` from start to stop."""

    def __init__(
        self,
        model: str,
        loaded: LoadedModel,
        plans: list[WorkerPlan],
        pools: PoolConfig,
        routing: RoutingConfig,
        http: HttpConfig,
        model_config: ModelConfig,
        slo: SloConfig,
        attach_config: AttachConfig,
        key: ClusterKey | None,
        links: Mapping[tuple[WorkerId, WorkerId], LinkCost] = {},
    ) -> None:
        """`links` is what handoffs between workers are expected to take."""
        self._key = key
        self._links = links
        self._slo = slo
        self._model = model
        self._name = model_config.model_name or model
        self._loaded = loaded
        self._plans = plans
        self._pools = pools
        self._routing = routing
        self._http = http
        self._attach = attach_config

    async def run(self) -> None:
        front = Frontend(self._loaded, self._name, self._routing, self._http, self._slo, _JOIN, self._attach, self._key)
        front.service.view.links.expect(self._links)
        front.catch_signals()
        members = front.membership
        actuator = ProcessActuator(self._model, front.link.address, self._plans, members.lost, members.cannot_start)
        running = front.run_in_background()
        if self._plans:
            running.append(asyncio.create_task(actuator.run()))
        try:
            url, admin_url = await front.serve_http()
            if await self._until_ready(front, running):
                actuator.carry_on()
                self._announce(url, admin_url, front.asking(url))
                front.write_ready_file(url, admin_url, self._name)
            await first_of(running, front.stop_asked)
            await front.drain(console.print)
        finally:
            try:
                await front.stop_http()
            finally:
                await actuator.stop()
                await front.end(running)
        console.print("stopped")

    async def _until_ready(self, front: Frontend, running: list[asyncio.Task[None]]) -> bool:
        """Show what the workers do until all have joined; False if asked to stop before."""
        deadline = asyncio.get_running_loop().time() + self._pools.start_timeout
        expected = [*(plan.worker for plan in self._plans), *front.attachments.workers]
        if not console.is_terminal:
            console.print(f"starting {', '.join(expected)}", highlight=False)
        with console.status("starting") as status:
            while waiting := [worker for worker in expected if worker not in front.service.view.members]:
                stages = [f"{worker}: {front.membership.stages.get(worker, 'starting')}" for worker in waiting]
                status.update(", ".join(stages))
                if asyncio.get_running_loop().time() > deadline:
                    raise ConfigError(
                        f"not ready after {self._pools.start_timeout:g} s: {', '.join(stages)}; "
                        "see the messages above, or give more time with --start-timeout"
                    )
                await first_of(running, front.stop_asked, timeout=0.1)
                if front.stop_asked.is_set():
                    return False
        return True

    def _announce(self, url: str, admin_url: str, asking: str) -> None:
        console.print(f"[bold]{self._name}[/bold] at [bold]{url}[/bold], policy {self._routing.policy}")
        console.print(f"  admin API at {admin_url}", highlight=False)
        for plan in self._plans:
            console.print(f"  {plan.worker:<12} {plan.role.value:<8} on {plan.device}")
        for index, server in enumerate(self._attach.urls):
            console.print(f"  {f'attached-{index}':<12} {Role.MIXED.value:<8} at {server}", highlight=False)
        question = {"role": "user", "content": "What is the capital of France?"}
        body = json.dumps({"model": self._name, "temperature": 0, "messages": [question]})
        console.print("try:", highlight=False)
        console.print(
            f"  {asking} -d '{body}'",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
