"""One worker process from its settings to its end: device, model, memory, sockets, signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
import uuid
from dataclasses import dataclass, replace

from bascule.clock import WallClock
from bascule.config import EngineConfig, HandoffConfig, HardwareConfig, ModelConfig, SloConfig, StoreConfig
from bascule.engine.core import Engine, EngineLimits
from bascule.engine.mock import MockRunner
from bascule.engine.protocol import Runner
from bascule.errors import ConfigError
from bascule.hardware import read_hardware
from bascule.keys import ClusterKey
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.description import describe
from bascule.kv.store.forms import Forms
from bascule.kv.store.places import open_stores
from bascule.kv.store.tiers import Tiers
from bascule.kv.transfer.coding import Coding
from bascule.machine import end_with_parent
from bascule.models import LoadedModel, load
from bascule.native import DISABLE
from bascule.types import CostModel, Epoch, ModelCard, Role, WorkerId
from bascule.wire import Starting
from bascule.worker.card import as_offered, layout_of, mock_card_of
from bascule.worker.checks import check_settings, read_cost_model
from bascule.worker.link import RouterSocket
from bascule.worker.parts import Identity, Parts
from bascule.worker.profile import cpu_name, profiled
from bascule.worker.worker import Worker

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Everything one worker needs to start."""

    model: str
    join: str
    worker: WorkerId
    role: Role
    device_kind: str
    device_index: int
    cores: tuple[int, ...]
    device_name: str
    host: str
    model_config: ModelConfig
    engine_config: EngineConfig
    handoff_config: HandoffConfig
    slo_config: SloConfig
    store_config: StoreConfig
    hardware_config: HardwareConfig
    key: ClusterKey | None = None
    parent: int | None = None
    """Process id of the launcher: this worker ends with it."""


def run(settings: WorkerSettings) -> None:
    """Run a worker until it is told to stop; raises ConfigError, ModelError or RegistrationRefused with the reason."""
    if settings.parent is not None:
        end_with_launcher(settings.parent)
    take_cores(settings.cores)
    asyncio.run(_run(settings))


def take_cores(cores: tuple[int, ...]) -> None:
    """Let this process compute on these alone, and on all where there are none."""
    if cores:
        os.sched_setaffinity(0, cores)
        os.environ["OMP_NUM_THREADS"] = str(len(cores))


async def _run(settings: WorkerSettings) -> None:
    epoch = Epoch(f"{settings.worker}-{uuid.uuid4().hex[:12]}")
    link = RouterSocket(settings.join, epoch, settings.key)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    started = time.monotonic()

    def stage(text: str) -> None:
        link.send(Starting(settings.worker, text))

    stage("loading the model")
    parts = await asyncio.to_thread(build, settings)
    if settings.engine_config.engine == "torch" and settings.hardware_config.hardware is None:
        stage("measuring what steps cost")
        parts = replace(parts, cost=await asyncio.to_thread(_measured, settings, parts))
    identity = Identity(worker=settings.worker, epoch=epoch, role=settings.role, device=settings.device_name)
    worker = Worker(identity, parts, link, settings.host, settings.handoff_config, WallClock())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.leave)
    log.info("%s is up after %.1f s", settings.worker, time.monotonic() - started)
    try:
        await worker.run()
    finally:
        link.close()
        parts.arena.close()


def build(settings: WorkerSettings) -> Parts:
    """Load the model, map KV memory and compose the engine."""
    config = settings.engine_config
    codec, pushed = settings.store_config.kv_codec, settings.handoff_config.transfer_codec
    loaded = load(settings.model)
    check_settings(
        config, settings.handoff_config, settings.store_config, layout_of(loaded, settings.model_config, config)
    )
    runner = _mock_runner(settings, loaded) if config.engine == "mock" else _torch_runner(settings, loaded)
    runner.card = as_offered(runner.card, loaded, settings.handoff_config, settings.store_config)
    layout = runner.card.layout
    num_blocks = config.kv_bytes // layout.block_bytes
    coding = Coding.of(pushed, layout)
    stores = open_stores(settings.store_config)
    arena = Arena.create(layout, num_blocks)
    books = Books(num_blocks, layout.block_size)
    if (tokens := num_blocks * layout.block_size) < runner.card.context:
        log.warning(
            "the KV memory holds %d tokens, and the model's context is %d: longer requests are refused; --kv-memory "
            "takes more",
            tokens,
            runner.card.context,
        )
    hasher = BlockHasher(runner.card.fingerprint, layout.block_size)
    tiers = None
    if stores:
        card, forms = runner.card, Forms(codec, layout)
        tiers = Tiers(stores, arena, books, card.fingerprint, forms, description=describe(card))
    limits = EngineLimits(
        max_sequences=config.max_sequences,
        chunk_tokens=config.chunk_tokens,
        step_tokens=max(config.step_tokens, config.max_sequences),
        prefix_cache=config.prefix_cache,
        slo=settings.slo_config.slo,
    )
    engine = Engine(runner, arena, books, hasher, limits)
    engine.cost = cost = _known_cost(settings, runner.card)
    engine.publishes = bool(stores) or (config.prefix_cache and settings.handoff_config.peer_fetch)
    return Parts(
        runner=runner,
        tiers=tiers,
        arena=arena,
        books=books,
        hasher=hasher,
        engine=engine,
        max_sequences=config.max_sequences,
        chunk_tokens=min(config.chunk_tokens, max(config.step_tokens, config.max_sequences)),
        cost=cost,
        coding=coding,
    )


def _torch_runner(settings: WorkerSettings, loaded: LoadedModel) -> Runner:
    try:
        from bascule.engine.torch.runner import TorchRunner
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this worker needs {error.name}; pip install 'bascule[engine]' (in a clone: '.[engine]')"
        ) from error
    device = "cpu" if settings.device_kind == "cpu" else f"cuda:{settings.device_index}"
    return TorchRunner(
        loaded.spec,
        loaded.source,
        dtype=settings.model_config.dtype,
        device=device,
        threads=max(1, len(settings.cores)),
        name=settings.model_config.model_name or settings.model,
        block_size=settings.engine_config.block_size,
        context=settings.model_config.max_model_len,
        quantize=settings.model_config.quantize,
        dense_twin=settings.model_config.dense_twin,
    )


def _mock_runner(settings: WorkerSettings, loaded: LoadedModel) -> Runner:
    """Its steps take what the cost model says; a hardware file says only what they are expected to take."""
    card = mock_card_of(settings.model, loaded, settings.model_config, settings.engine_config)
    return MockRunner(card, read_cost_model(settings.engine_config.cost_model), time.sleep)


def _measured(settings: WorkerSettings, parts: Parts) -> CostModel:
    form = settings.model_config
    device = f"{settings.device_kind} {cpu_name()} {len(settings.cores)}"
    if settings.device_kind != "cpu":
        device = settings.device_name
    how = f"{device}, {form.dtype} {form.quantize} {form.dense_twin} {bool(os.environ.get(DISABLE))}"
    return profiled(parts.runner, how, parts.books.num_blocks, parts.max_sequences)


def _known_cost(settings: WorkerSettings, card: ModelCard) -> CostModel:
    """What steps are said to cost, before any is taken; raises ConfigError for a hardware file of another model."""
    path, name = settings.hardware_config.hardware, settings.hardware_config.worker_class
    if path is None:
        return read_cost_model(settings.engine_config.cost_model)
    hardware = read_hardware(path)
    hardware.require_model(card.name, card.fingerprint, path)
    found = hardware.class_of(name, settings.device_kind, len(settings.cores))
    log.info("what steps cost is that of the class %s in %s", found.name, path)
    return found.cost


def end_with_launcher(parent: int) -> None:
    """Have the kernel kill this process when the launcher dies, however it dies; raises ConfigError if it has."""
    end_with_parent()
    if os.getppid() != parent:
        raise ConfigError("the launcher has ended while this worker started")
