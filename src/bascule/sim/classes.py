"""The classes of workers that a simulation is of, from files, and pools of them from words (`prefill=4xh100.json`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from bascule.errors import ConfigError
from bascule.hardware import ClassFile, Hardware, read_class, read_hardware, require_one_model
from bascule.sim.cluster import Pool
from bascule.sim.worker import Kind
from bascule.types import Role

_SPLIT = ("disaggregated", "thresholds")


class Memory(Struct, frozen=True, kw_only=True):
    """What a class has where its file does not say."""

    kv_bytes: int
    kv_token_bytes: int
    chunk_tokens: int = 512
    max_sequences: int = 64


def kind_of(name: str, told: ClassFile, memory: Memory) -> Kind:
    """A class of a file as a simulation takes it."""
    chunk = told.chunk_tokens or memory.chunk_tokens
    token_bytes = told.kv_token_bytes or memory.kv_token_bytes
    return Kind(
        name=name,
        cost=told.cost,
        kv_tokens=told.kv_tokens or memory.kv_bytes // max(token_bytes, 1),
        max_sequences=told.max_sequences or memory.max_sequences,
        chunk_tokens=chunk,
        step_tokens=max(chunk, 512),
    )


class Classes:
    """The classes that a command line names, each read once. Raises ConfigError for what cannot be."""

    def __init__(
        self,
        cost_model: Path | None,
        hardware: Path | None,
        *,
        kv_bytes: int,
        kv_token_bytes: int,
        chunk_tokens: int,
        max_sequences: int,
    ) -> None:
        """Workers that no pool names are of the class in `cost_model`, else of the first in `hardware`. The numbers are
        for classes that say nothing of them."""
        if cost_model is not None and hardware is not None:
            raise ConfigError("--cost-model and --hardware both say what steps take; give one of them")
        self.prices: dict[str, float] = {}
        """Of workers, by class."""
        self.kv_token_bytes = kv_token_bytes
        self._cost_model = cost_model
        self._path = hardware
        self._hardware = Hardware() if hardware is None else read_hardware(hardware)
        self._kv_bytes = kv_bytes
        self._chunk_tokens = chunk_tokens
        self._max_sequences = max_sequences
        self._read: dict[str, tuple[Path, ClassFile]] = {}
        self._kinds: dict[str, Kind] = {}

    def default(self, policy: str, workers: int, prefill: float) -> tuple[Pool, ...]:
        """Mixed workers, or those of a split."""
        kind = self._kind(self._first())
        if policy not in _SPLIT:
            return (Pool(Role.MIXED, kind, workers),)
        if workers < 2 or not 0 < prefill < 1:
            raise ConfigError(
                f"{policy} needs a prefill and a decode worker: --workers is {workers}, --prefill {prefill:g} (a share)"
            )
        first = min(max(round(workers * prefill), 1), workers - 1)
        return Pool(Role.PREFILL, kind, first), Pool(Role.DECODE, kind, workers - first)

    def pools(self, texts: tuple[str, ...]) -> tuple[Pool, ...]:
        """Those that are given one by one."""
        return tuple(self._pool(text) for text in texts)

    def rate(self, *, same_machine: bool) -> float | None:
        """Bytes per second of links, as the hardware file has them."""
        found = self._hardware.typical(same_machine=same_machine)
        return None if found is None else found.bytes_per_s

    def described(self) -> list[dict[str, Any]]:
        """For the report."""
        return [
            {"name": kind.name, "file": str(self._read[given][0]), "kv_tokens": kind.kv_tokens}
            for given, kind in self._kinds.items()
        ]

    def _first(self) -> str:
        """How the class of workers that no pool names is given."""
        if self._cost_model is not None:
            return str(self._cost_model)
        if self._path is None:
            raise ConfigError(
                "give --hardware FILE, as `bascule profile` writes it, or --cost-model FILE, or --pool: which say what "
                "steps take"
            )
        if not self._hardware.names:
            raise ConfigError(f"{self._path} has no class of workers, only links; measure one with `bascule profile`")
        return self._hardware.names[0]

    def _pool(self, text: str) -> Pool:
        role, _, rest = text.partition("=")
        count, _, given = rest.partition("x")
        if role not in tuple(Role) or not count.isdecimal() or not int(count) or not given:
            raise ConfigError(f"--pool {text!r} is not ROLE=COUNTxCLASS with a role of {', '.join(Role)}")
        return Pool(Role(role), self._kind(given), int(count))

    def _kind(self, given: str) -> Kind:
        """Of a file, or of a class of the hardware file."""
        if given in self._kinds:
            return self._kinds[given]
        if self._path is not None and (given in self._hardware.names or not Path(given).exists()):
            self._read[given] = self._path, self._hardware.named(given)
        else:
            self._read[given] = Path(given), read_class(Path(given))
        require_one_model(self._read.values())
        told = self._read[given][1]
        if told.kv_token_bytes is not None:
            self.kv_token_bytes = told.kv_token_bytes
        memory = Memory(
            kv_bytes=self._kv_bytes,
            kv_token_bytes=self.kv_token_bytes,
            chunk_tokens=self._chunk_tokens,
            max_sequences=self._max_sequences,
        )
        kind = kind_of(told.name or given, told, memory)
        if told.price_per_hour is not None:
            self.prices[kind.name] = told.price_per_hour
        self._kinds[given] = kind
        return kind
