"""What is compared: architectures by name, each with its share of the same cores and the same KV memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct

from bascule.errors import ConfigError

NAMES = ("single", "replicated", "disaggregated", "adaptive")
_MIB = 1 << 20


class Side(StrEnum):
    """What an architecture stands for in the question whether to split."""

    WHOLE = "whole"
    SPLIT = "split"
    ADAPTIVE = "adaptive"
    OTHER = "other"
    """Another system, given by its URL."""


class Architecture(Struct, frozen=True):
    """One way to use the hardware."""

    name: str
    policy: str
    prefill: int = 0
    decode: int = 0
    mixed: int = 0

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.mixed

    @property
    def side(self) -> Side:
        return {"disaggregated": Side.SPLIT, "adaptive": Side.ADAPTIVE}.get(self.policy, Side.WHOLE)

    @property
    def words(self) -> str:
        """Its workers, for a reader."""
        kinds = (("prefill", self.prefill), ("decode", self.decode), ("mixed", self.mixed))
        return " + ".join(f"{count} {role}" for role, count in kinds if count)

    def flags(self, cores: Sequence[int], kv_bytes: int) -> list[str]:
        """Those of `serve`: these cores and this KV memory, dealt out evenly. Raises ConfigError."""
        each, rest = divmod(len(cores), self.workers)
        if not each or rest:
            raise ConfigError(
                f"{len(cores)} cores cannot be dealt out evenly to the {self.workers} workers of {self.name}; give "
                f"--cores {self.workers * max(1, each)} (or another multiple of {self.workers}), or other architectures"
            )
        devices = ("cpu:" + "+".join(map(str, cores[at : at + each])) for at in range(0, len(cores), each))
        return [
            *("--policy", self.policy, "--devices", ",".join(devices)),
            *("--prefill", str(self.prefill), "--decode", str(self.decode), "--mixed", str(self.mixed)),
            *("--kv-memory", f"{kv_bytes // self.workers // _MIB}MiB"),
        ]


def architectures_of(text: str) -> list[Architecture]:
    """Names with commas between; raises ConfigError.

    `replicated` and `adaptive` have as many workers as the largest split that is named, else two; `replicated:N` has N.
    """
    names = [name.strip() for name in text.split(",")]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--architectures names {twice} twice")
    splits = [_split(name) for name in names]
    workers = max((split.workers for split in splits if split is not None), default=2)
    return [split or _whole(name, workers) for name, split in zip(names, splits, strict=True)]


def _split(name: str) -> Architecture | None:
    if name == "disaggregated":
        return Architecture(name, "disaggregated", prefill=1, decode=1)
    match = re.fullmatch(r"([1-9]\d{0,2})p([1-9]\d{0,2})d", name)
    return Architecture(name, "disaggregated", int(match[1]), int(match[2])) if match else None


def _whole(name: str, workers: int) -> Architecture:
    match = re.fullmatch(r"(single|replicated|adaptive)(?::([1-9]\d{0,2}))?", name)
    if match is None or (match[1] == "single" and match[2]):
        raise ConfigError(
            f"architecture {name!r} is not known; there are {', '.join(NAMES)}, XpYd for X prefill and Y decode "
            "workers (2p1d), replicated:N and adaptive:N"
        )
    return Architecture(name, match[1], mixed=1 if match[1] == "single" else int(match[2] or workers))
