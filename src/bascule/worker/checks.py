"""Settings of a worker that cannot go with its model or with each other: known before anything large is loaded.

Each check raises ConfigError, which names the flag and what to give instead.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from bascule.config import EngineConfig, HandoffConfig, StoreConfig
from bascule.errors import UNREADABLE, ConfigError
from bascule.kv.codecs import codec_named
from bascule.kv.codecs.choice import names_of
from bascule.kv.store.places import DISK_KEY, HOST_KEY, parse_disk, parse_host
from bascule.machine import memory_bytes
from bascule.types import CostModel, KVLayout


def check_settings(engine: EngineConfig, handoff: HandoffConfig, store: StoreConfig, layout: KVLayout) -> None:
    """All of them, for a worker whose KV has this layout, and that its machine has the memory."""
    if engine.kv_bytes > (memory := memory_bytes()):
        raise ConfigError(
            f"--kv-memory {engine.kv_memory} is more than this machine's memory of {memory}; ask for less"
        )
    check_memory(engine, layout)
    check_tiers(engine, store, layout)
    check_codecs(handoff, store, layout)
    read_cost_model(engine.cost_model)


def check_memory(engine: EngineConfig, layout: KVLayout) -> None:
    """KV memory is for two blocks at the least."""
    if (blocks := engine.kv_bytes // layout.block_bytes) < 2:
        raise ConfigError(
            f"--kv-memory {engine.kv_memory} holds {blocks} blocks of {layout.block_bytes} bytes "
            f"({layout.block_size} tokens each); give a few hundred blocks, {2 * layout.block_bytes} bytes at the least"
        )


def check_tiers(engine: EngineConfig, store: StoreConfig, layout: KVLayout) -> None:
    """Tiers are found by the prefix cache, and those of a bounded size hold two blocks at the least."""
    if store.tiers and not engine.prefix_cache:
        raise ConfigError("--kv-host, --kv-disk and --kv-remote need the prefix cache; leave out --no-prefix-cache")
    capacities = {}
    if store.kv_host is not None:
        capacities[HOST_KEY] = parse_host(store.kv_host)
    if store.kv_disk is not None:
        capacities[DISK_KEY] = parse_disk(store.kv_disk).capacity
    for key, capacity in capacities.items():
        if capacity < 2 * layout.block_bytes:
            raise ConfigError(
                f"{key}: {capacity} bytes hold no two blocks of {layout.block_bytes}; give a few hundred blocks, or "
                "leave the key out"
            )


def check_codecs(handoff: HandoffConfig, store: StoreConfig, layout: KVLayout) -> None:
    """Codecs can represent the model's KV."""
    for key, codec in (("--transfer-codec", handoff.transfer_codec), ("--kv-codec", store.kv_codec)):
        try:
            for name in names_of(codec):
                codec_named(name, layout)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error


def read_cost_model(path: Path | None) -> CostModel:
    """What a file says that steps cost; nothing, without one."""
    if path is None:
        return CostModel()
    try:
        return msgspec.json.decode(path.read_bytes(), type=CostModel)
    except OSError as error:
        raise ConfigError(f"cannot read the cost model {path}: {error.strerror}") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path} is not a cost model: {error}") from error
