"""What a worker on this host would meet at a router: asked of the router itself, without joining."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any

from bascule import __version__
from bascule.cli.fitness import Finding, Level, found
from bascule.keys import ClusterKey
from bascule.reach import CONNECT_S, first_unreachable
from bascule.router.differences import differences
from bascule.router.skew import MOST_S, skewed
from bascule.types import Epoch, ModelCard, WorkerId
from bascule.wire import VERSION, Neighbour, Probe, Probed, RouterMessage
from bascule.worker.link import RouterSocket

_ANSWER_S = 3 * CONNECT_S
"""The router tries one address meanwhile; a wrong key is known for sure after some 3 s."""
_MOST_TRIED = 64
"""Workers that are connected to, all at once."""


async def joining(
    join: str, host: str, key: ClusterKey | None, card: ModelCard | None, name: str | None = None
) -> list[Finding]:
    """Findings about the router at `join` as a worker at `host` with `key` meets it, and about the workers there.

    `card` is what the worker would register with, and `name` its id; None if it is not known.
    """
    try:
        listening = await asyncio.start_server(lambda _, writer: writer.close(), host, 0)
    except OSError as error:
        what = f"cannot listen for peers on {host}: {error.strerror}"
        return [Finding(Level.WRONG, what, "give --host an address of this machine")]
    async with listening:
        address = f"{host}:{listening.sockets[0].getsockname()[1]}"
        answer = await _ask(join, key, Probe(VERSION, (address,)))
        here = time.time()
    if isinstance(answer, Finding):
        return [answer]
    findings = [
        Finding(Level.OK, f"the router at {join} lets us in"),
        found(
            answer.version == VERSION,
            f"protocol version {VERSION} here, {answer.version} there",
            "run the same release of bascule on both",
        ),
        found(
            answer.release == __version__,
            f"bascule {__version__} here, {answer.release} there",
            "run the same release on all hosts",
            Level.DOUBT,
        ),
        found(
            not answer.unreachable,
            f"the router connects back to {host}"
            if not answer.unreachable
            else f"the router cannot connect to this host at {answer.unreachable}",
            "give --host an address of this machine that the others reach, and let them through in its firewall",
        ),
        _clock(answer.clock - here),
        *await _reaching(answer.members),
        *_reached(answer),
    ]
    if name is not None:
        findings.append(_named(name, answer))
    if card is None:
        return findings
    if card.tokenizer and answer.tokenizer:
        same = card.tokenizer == answer.tokenizer
        what = f"the router's vocabulary is {'that' if same else 'not that'} of this model"
        findings.append(found(same, what, "start router and workers with the same model"))
    if answer.card is not None:
        findings += compared(card, answer.card)
    elif answer.attached_vocab not in (None, card.vocab):
        what = f"vocabulary of {card.vocab} here, {answer.attached_vocab} at the attached servers"
        findings.append(Finding(Level.WRONG, what, "start router and workers with the same model"))
    return findings


async def _reaching(members: Sequence[Neighbour]) -> list[Finding]:
    """Whether this host connects to the workers that are there."""
    workers = [member for member in members if member.addresses][:_MOST_TRIED]
    why = await asyncio.gather(*(first_unreachable(worker.addresses) for worker in workers))
    mend = "check its --host, and the firewalls between; until then no KV goes there"
    findings = [
        Finding(Level.DOUBT, f"this host cannot connect to worker {worker.worker} at {reason}", mend)
        for worker, reason in zip(workers, why, strict=True)
        if reason is not None
    ]
    if workers and not findings:
        findings.append(Finding(Level.OK, f"this host connects to the cluster's workers ({len(workers)} tried)"))
    return findings


def _reached(answer: Probed) -> list[Finding]:
    """Whether the workers that are there connect to this host."""
    from_workers = answer.from_workers or {}
    firewall = "check --host, and the firewalls between; until then no KV comes from there"
    findings = [
        Finding(Level.DOUBT, f"worker {worker} cannot connect to this host at {why}", firewall)
        for worker, why in from_workers.items()
        if why
    ]
    findings += [
        Finding(
            Level.DOUBT,
            f"worker {worker} did not tell in time whether it connects to this host",
            "see in its log whether it hangs, or is of an earlier release; ask again",
        )
        for worker in _silent(answer)
    ]
    if from_workers and not findings:
        findings.append(Finding(Level.OK, f"the cluster's workers connect to this host ({len(from_workers)} tried)"))
    return findings


def _silent(answer: Probed) -> list[WorkerId]:
    """Workers that were asked to connect to this host, and did not tell in time."""
    if answer.from_workers is None:
        return []
    asked = [member.worker for member in answer.members if member.addresses][:_MOST_TRIED]
    return [worker for worker in asked if worker not in answer.from_workers]


def _named(name: str, answer: Probed) -> Finding:
    """Whether a worker may be called so: one that is silent loses its name to the next."""
    if all(member.worker != name for member in answer.members):
        return Finding(Level.OK, f"the name {name} is free")
    if name not in _silent(answer):
        mend = "give another with --id, or stop that one first"
        return Finding(Level.WRONG, f"the name {name} is taken by another in the cluster", mend)
    what = f"worker {name} of the cluster does not answer; a worker of that name takes its place"
    return Finding(Level.DOUBT, what, "give another with --id if that one is to stay")


def compared(here: ModelCard, there: ModelCard) -> list[Finding]:
    """One for each difference from the cluster's workers for which a worker is refused; a good one without any."""
    same = "model, dtype, block size, context and codecs are those of the cluster's workers"
    return [
        Finding(
            Level.WRONG,
            f"{one.what} {one.here} here, {one.there} at the cluster's workers",
            f"start all workers with the same {one.same}",
        )
        for one in differences(here, there)
    ] or [Finding(Level.OK, same)]


def _clock(behind_s: float) -> Finding:
    if abs(behind_s) > MOST_S:
        return Finding(Level.DOUBT, skewed("this host", behind_s))
    return Finding(Level.OK, f"this host's clock is {abs(behind_s):.1f} s off the router's")


async def _ask(join: str, key: ClusterKey | None, probe: Probe) -> Probed | Finding:
    """The router's answer, or why there is none."""
    if join.startswith("tcp://") and (why := await first_unreachable([join])) is not None:
        mend = "start it, mend --join, or let this host through to it in its firewall"
        return Finding(Level.WRONG, f"the router at {why} cannot be reached", mend)
    link = RouterSocket(join, Epoch(f"doctor-{uuid.uuid4().hex[:12]}"), key)
    answered: asyncio.Future[Probed] = asyncio.get_running_loop().create_future()

    def hear(message: RouterMessage) -> None:
        if isinstance(message, Probed) and not answered.done():
            answered.set_result(message)

    reading = asyncio.create_task(link.serve(hear))
    refused = asyncio.create_task(link.turned_away())
    try:
        link.send(probe)
        either: set[asyncio.Future[Any]] = {answered, refused}
        await asyncio.wait(either, timeout=_ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            return answered.result()
        if refused.done():
            return Finding(Level.WRONG, str(refused.exception()))
        mend = "is it a router of this release that does not hang, with its address in --bind?"
        return Finding(Level.WRONG, f"what listens at {join} does not answer as a router", mend)
    finally:
        for task in (reading, refused):
            task.cancel()
        await asyncio.gather(reading, refused, return_exceptions=True)
        link.close()
