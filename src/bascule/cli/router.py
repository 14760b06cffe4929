"""`bascule router`: the router and API alone; workers join from wherever they run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import uvloop

from bascule.addresses import check_address
from bascule.cli.fitness import act_on, of_clear, of_router
from bascule.cli.frontend import Frontend, first_of
from bascule.cli.keys import cluster_key_of
from bascule.cli.screen import begin_log
from bascule.cli.screen import screen as console
from bascule.cli.worker import Flat
from bascule.config import AttachConfig, HttpConfig, ModelConfig, RoutingConfig, SecurityConfig, SloConfig, StoreConfig
from bascule.keys import ClusterKey, check_open, stays_here
from bascule.models import load

log = logging.getLogger(__name__)


def router(
    model: str = "smollm2",
    /,
    *,
    bind: str = "tcp://127.0.0.1:8100",
    routing: Annotated[RoutingConfig, Flat] = RoutingConfig(),
    http: Annotated[HttpConfig, Flat] = HttpConfig(),
    model_config: Annotated[ModelConfig, Flat] = ModelConfig(),
    slo_config: Annotated[SloConfig, Flat] = SloConfig(),
    attach_config: Annotated[AttachConfig, Flat] = AttachConfig(),
    security_config: Annotated[SecurityConfig, Flat] = SecurityConfig(),
    config: Path | None = None,
) -> None:
    """Run a router without workers; needs no torch.

    Examples: bascule router smollm2 --bind tcp://127.0.0.1:8100,
    or in front of a running server: bascule router org/model --attach http://gpu1:8000

    Parameters
    ----------
    model
        Whose tokenizer to use: `smollm2`, a directory in Hugging Face format, a GGUF file or a hub id.
    bind
        Where workers join (`bascule worker --join` takes this address).
    config
        TOML file with the same keys as these flags.
    """
    begin_log(http.log_level, "router")
    check_address("--bind", bind, listens=True)
    key = cluster_key_of(security_config)
    if doubt := check_open(key, security_config.insecure, f"--bind {bind}", stays_here(bind)):
        log.warning("%s", doubt)
    act_on(of_clear(key, security_config, StoreConfig(), attach_config))
    act_on(of_router(routing))
    uvloop.run(_run(model, bind, routing, http, model_config, slo_config, attach_config, key))


async def _run(
    model: str,
    bind: str,
    routing: RoutingConfig,
    http: HttpConfig,
    model_config: ModelConfig,
    slo: SloConfig,
    attach: AttachConfig,
    key: ClusterKey | None,
) -> None:
    front = Frontend(load(model), model_config.model_name or model, routing, http, slo, bind, attach, key)
    front.catch_signals()
    running = front.run_in_background()
    try:
        url, admin_url = await front.serve_http()
        console.print(f"API at {url}, admin API at {admin_url}", highlight=False)
        flags = "" if stays_here(bind) else " --host ADDRESS_OF_ITS_MACHINE"
        flags += " --cluster-key-file FILE" if key is not None else ""
        join = front.link.address.replace("//0.0.0.0:", "//ADDRESS_OF_THIS_MACHINE:")
        console.print(
            f"start workers with: bascule worker {model} --join {join}{flags} --id NAME --role ROLE",
            highlight=False,
            soft_wrap=True,
        )
        while not front.service.ready and not front.stop_asked.is_set():
            await first_of(running, front.stop_asked, timeout=0.1)
        if front.service.ready:
            front.write_ready_file(url, admin_url, model_config.model_name or model)
        await first_of(running, front.stop_asked)
        await front.drain(console.print)
    finally:
        try:
            await front.stop_http()
        finally:
            await front.end(running)
