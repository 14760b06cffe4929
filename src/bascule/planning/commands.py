"""The commands that start what was recommended, as they would be typed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from msgspec import Struct

from bascule.config import EngineConfig, SloConfig
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
        return _attached(candidate, model, slo, links)
    note = ""
    if any(share.of.device == "cuda" for share in candidate.shares):
        note = "Bascule's CUDA path is written and has not been run on a GPU yet; try one worker first"
    hardware = {share.of.hardware for share in candidate.shares}
    engines = {_engine(share) for share in candidate.shares}
    if len(hardware) == 1 and len(engines) == 1 and candidate.devices <= links.machine_devices:
        return Started(commands=(_serve(candidate, model, slo, links),), note=note)
    return Started(commands=tuple(_apart(candidate, model, slo, links)), note=note)


class _Placed(Struct, frozen=True, kw_only=True):
    """A worker where it is to run."""

    share: Share
    number: int
    """Of its pool."""
    machine: int
    first: int
    """Of its devices there."""

    @property
    def device(self) -> str:
        if self.share.of.device == "cuda":
            return f"cuda:{self.first}"
        return "cpu:" + "+".join(str(self.first + core) for core in range(self.share.of.devices))


def _placed(candidate: Candidate, links: Links) -> Iterator[_Placed]:
    """All workers: a machine is filled before the next one is begun, as in the simulations."""
    machine, taken, hardware = -1, links.machine_devices, ""
    for share in candidate.shares:
        for number in range(share.count):
            if share.of.hardware != hardware or taken + share.of.devices > links.machine_devices:
                machine, taken, hardware = machine + 1, 0, share.of.hardware
            yield _Placed(share=share, number=number, machine=machine, first=taken)
            taken += share.of.devices


def _serve(candidate: Candidate, model: str, slo: Slo, links: Links) -> str:
    counts = " ".join(f"--{share.role} {share.count}" for share in candidate.shares)
    devices = ",".join(placed.device for placed in _placed(candidate, links))
    return _joined(
        f"bascule serve {model} --policy {candidate.architecture} {counts}",
        f"--devices {devices} {_engine(candidate.shares[0])}",
        _bounds(slo),
    )


def _apart(candidate: Candidate, model: str, slo: Slo, links: Links) -> Iterator[str]:
    yield "bascule cluster-key cluster.key    # copy it to every machine"
    yield _joined(
        f"bascule router {model} --bind tcp://0.0.0.0:8100 --policy {candidate.architecture} {_KEY}", _bounds(slo)
    )
    for placed in _placed(candidate, links):
        share = placed.share
        yield _joined(
            f"bascule worker {model} --join tcp://ROUTER:8100 --host THIS-MACHINE --id {share.role}-{placed.number}",
            f"--role {share.role} --device {placed.device} {_engine(share)} {_KEY}",
            _bounds(slo) + f"    # on {share.of.hardware} machine {placed.machine}",
        )


def _attached(candidate: Candidate, model: str, slo: Slo, links: Links) -> Started:
    if any(share.role is not Role.MIXED for share in candidate.shares):
        return Started(
            commands=(),
            note="Bascule's own workers have one GPU each, and attached servers take no handoff: a split over workers "
            "of several GPUs cannot be started yet; its figures say what it would be worth",
        )
    [share] = candidate.shares
    servers = list(_placed(candidate, links))
    lines = [
        f"CUDA_VISIBLE_DEVICES={','.join(str(one.first + gpu) for gpu in range(share.of.devices))} "
        f"vllm serve {model} --tensor-parallel-size {share.of.devices} --port {8001 + one.number}"
        f"    # on machine {one.machine}"
        for one in servers
    ]
    urls = ",".join(f"http://MACHINE-{one.machine}:{8001 + one.number}" for one in servers)
    policy = "replicated" if candidate.architecture == "single" else candidate.architecture
    lines.append(_joined(f"bascule router {model} --policy {policy} --attach {urls}", _bounds(slo)))
    note = "workers of several GPUs are servers with tensor parallelism, started apart and attached"
    if (known := share.of.analytic) is not None:
        note += f"; the figures are of {known.framework} with {known.weights} weights: give a MODEL in that form"
    return Started(commands=tuple(lines), note=note)


def _engine(share: Share) -> str:
    """Flags of the engine that the figures are of."""
    kind, default = share.of.kind, EngineConfig()
    given = (
        ("chunk-tokens", kind.chunk_tokens, default.chunk_tokens),
        ("step-tokens", kind.step_tokens, default.step_tokens),
        ("max-sequences", kind.max_sequences, default.max_sequences),
    )
    memory = f"--kv-memory {-(-kind.kv_tokens * share.of.kv_token_bytes // 2**20)}MiB"
    return " ".join([memory, *(f"--{name} {value}" for name, value, usual in given if value != usual)])


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
