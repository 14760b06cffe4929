"""Which worker runs on what: device names, and how a machine's cores are dealt out."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import pairwise

from bascule.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """`cpu:0+1` (these cores, one thread each), `cpu` (all cores) or `cuda:0`."""

    kind: str
    cores: tuple[int, ...] = ()
    index: int = 0

    def __str__(self) -> str:
        if self.kind == "cuda":
            return f"cuda:{self.index}"
        return "cpu:" + "+".join(map(str, self.cores)) if self.cores else "cpu"


def parse_device(text: str) -> Device:
    """Raises ConfigError for a name that is none, or cores that this process may not use."""
    if (match := re.fullmatch(r"cuda(?::(\d+))?", text.strip())) is not None:
        return Device("cuda", index=int(match[1] or 0))
    match = re.fullmatch(r"cpu(?::(\d+(?:\+\d+)*))?", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a device; write for example cpu:0, cpu:0+1, cpu or cuda:0")
    allowed = os.sched_getaffinity(0)
    cores = tuple(int(core) for core in match[1].split("+")) if match[1] else tuple(sorted(allowed))
    if missing := sorted(set(cores) - allowed):
        raise ConfigError(f"device {text}: core {missing[0]} is not usable here; usable cores: {sorted(allowed)}")
    return Device("cpu", cores)


def deal_out(devices: str | None, workers: int) -> list[Device]:
    """A device for each of `workers` workers: as listed, or this machine's cores dealt out evenly.

    With more workers than cores, workers share cores in turn.
    """
    if devices is not None:
        listed = [parse_device(text) for text in devices.split(",")]
        if len(listed) != workers:
            raise ConfigError(f"--devices lists {len(listed)} devices for {workers} workers; list one for each")
        return listed
    cores = sorted(os.sched_getaffinity(0))
    if workers >= len(cores):
        return [Device("cpu", (cores[index % len(cores)],)) for index in range(workers)]
    bounds = [round(index * len(cores) / workers) for index in range(workers + 1)]
    return [Device("cpu", tuple(cores[low:high])) for low, high in pairwise(bounds)]
