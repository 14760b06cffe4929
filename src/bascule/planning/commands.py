"""The commands that start what was recommended, as they would be typed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from msgspec import Struct

from bascule.config import SloConfig
from bascule.planning.candidates import Candidate, Share
from bascule.planning.fluid import Links
from bascule.types import Role, Slo

_KEY = "--cluster-key-file cluster.key"


class Started(Struct, frozen=True, kw_only=True):
    """How a candidate is started."""

    commands: tuple[str, ...]
    note: str = ""
    """What has to be known before."""


def commands(candidate: Candidate, model: str, slo: Slo, links: Links) -> Started:
    """For workers on one machine `serve`; else a router, and on each machine its workers.

    Workers that lie over several GPUs are not Bascule's own: servers with tensor parallelism are attached, which take
    whole requests only.
    """
    model = shlex.quote(model)
    if any(share.of.device == "cuda" and share.of.devices > 1 for share in candidate.shares):
        return _attached(candidate, model, slo)
    note = ""
    if any(share.of.device == "cuda" for share in candidate.shares):
        note = "Bascule's CUDA path is written and has not been run on a GPU yet; try one worker first"
    hardware = {share.of.hardware for share in candidate.shares}
    memories = {_memory(share) for share in candidate.shares}
    if len(hardware) == 1 and len(memories) == 1 and candidate.devices <= links.machine_devices:
        return Started(commands=(_serve(candidate, model, slo, memories.pop()),), note=note)
    return Started(commands=tuple(_apart(candidate, model, slo, links)), note=note)


def _serve(candidate: Candidate, model: str, slo: Slo, memory: str) -> str:
    counts = " ".join(f"--{share.role} {share.count}" for share in candidate.shares)
    devices, taken = [], 0
    for share in candidate.shares:
        for _ in range(share.count):
            devices.append(_device(share, taken))
            taken += share.of.devices
    return _joined(
        f"bascule serve {model} --policy {candidate.architecture} {counts}",
        f"--devices {','.join(devices)} --kv-memory {memory}",
        _bounds(slo),
    )


def _apart(candidate: Candidate, model: str, slo: Slo, links: Links) -> Iterator[str]:
    yield "bascule cluster-key cluster.key    # copy it to every machine"
    yield _joined(
        f"bascule router {model} --bind tcp://0.0.0.0:8100 --policy {candidate.architecture} {_KEY}", _bounds(slo)
    )
    for share in candidate.shares:
        fit = max(1, links.machine_devices // share.of.devices)
        for first in range(0, share.count, fit):
            for number in range(first, min(first + fit, share.count)):
                device = _device(share, (number - first) * share.of.devices)
                name = f"{share.role}-{number}"
                machine = f"{share.of.hardware} machine {first // fit}"
                yield _joined(
                    f"bascule worker {model} --join tcp://ROUTER:8100 --host THIS-MACHINE --id {name}",
                    f"--role {share.role} --device {device} --kv-memory {_memory(share)} {_KEY}",
                    _bounds(slo) + f"    # on {machine}",
                )


def _attached(candidate: Candidate, model: str, slo: Slo) -> Started:
    if any(share.role is not Role.MIXED for share in candidate.shares):
        return Started(
            commands=(),
            note="Bascule's own workers have one GPU each, and attached servers take no handoff: a split over workers "
            "of several GPUs cannot be started yet; its figures say what it would be worth",
        )
    [share] = candidate.shares
    ports = [8001 + number for number in range(share.count)]
    lines = [f"vllm serve {model} --tensor-parallel-size {share.of.devices} --port {port}" for port in ports]
    urls = ",".join(f"http://HOST:{port}" for port in ports)
    policy = "replicated" if candidate.architecture == "single" else candidate.architecture
    lines.append(_joined(f"bascule router {model} --policy {policy} --attach {urls}", _bounds(slo)))
    return Started(
        commands=tuple(lines),
        note="workers of several GPUs are servers with tensor parallelism, started apart and attached",
    )


def _device(share: Share, first: int) -> str:
    if share.of.device == "cuda":
        return f"cuda:{first}"
    return "cpu:" + "+".join(str(first + core) for core in range(share.of.devices))


def _memory(share: Share) -> str:
    return f"{-(-share.of.kind.kv_tokens * share.of.kv_token_bytes // 2**20)}MiB"


def _bounds(slo: Slo) -> str:
    default = SloConfig()
    given = (
        ("ttft", slo.ttft_s, default.slo_ttft),
        ("tpot", slo.tpot_s, default.slo_tpot),
        ("gap", slo.gap_s, default.slo_gap),
    )
    return " ".join(f"--slo-{name} {value:g}" for name, value, usual in given if value != usual)


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)
