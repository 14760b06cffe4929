"""`bascule probe`: what handing KV over takes between the workers of a running server, and what prompts notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from msgspec import Struct
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bascule.bench.profile import conditions
from bascule.cli.admin_api import Admin, NotAnswered, admin_url, ask
from bascule.cli.report import JsonTarget, write_json
from bascule.cli.screen import print_whole
from bascule.config import parse_size
from bascule.errors import ConfigError
from bascule.hardware import Hardware, LinkFile, Measured, TransferFile, add_to_file, read_hardware
from bascule.link_wire import LINK_TRANSPORTS
from bascule.policies.handoff import prefill_and_rest
from bascule.router.backend import LinkReport
from bascule.types import LinkCost, Role

PROMPTS = (128, 512, 1500, 4000, 16000)
_TRIES = 4
_AGAIN_S = 1.0
_FEW = 4
"""Links whose meaning is shown one by one; of more, those of the fastest and of the slowest."""


class Missed(Struct, frozen=True, kw_only=True):
    """A link that was not measured."""

    source: str = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    transport: str
    reason: str


class Meaning(Struct, frozen=True, kw_only=True):
    """What one link adds to a prompt."""

    source: str = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    transport: str
    prompt_tokens: int
    kv_bytes: int
    prefill_s: float
    """Of all steps of the prompt, alone on the first worker."""
    transfer_s: float
    """Of all its KV at once."""
    exposed_s: float
    """From the first token until the second worker has all: what the second token waits for."""
    share: float
    """Of that in prefill."""
    within_context: bool


def probe(
    *,
    admin: Admin = None,
    transports: str = "shm,tcp",
    size: str = "8MiB",
    runs: int = 5,
    out: Path | None = None,
    json: JsonTarget = None,
) -> None:
    """Measure every pair of workers that may hand KV over, and say what that means for prompts.

    The workers themselves push blocks to each other, as in a handoff, one pair at a time; nothing of it stays. Streams
    go on beside it, each push of --size bytes making a step or two longer. A worker that has prompts to compute refuses
    and is asked again; one that stays busy is left out.

    Example: bascule probe --out hw.json

    Parameters
    ----------
    admin
        Address of the server's admin API (default: the server that runs here, if it is the only one).
    transports
        Which to measure, with commas between: shm (within a machine), tcp.
    size
        Bytes of one push, at most 64MiB.
    runs
        Pushes that count, of each link and transport.
    out
        Hardware file to write, or to add to.
    json
        File to write what was measured to, `-` for standard output.
    """
    ways = tuple(dict.fromkeys(name.strip() for name in transports.split(",") if name.strip()))
    if not ways or not set(ways) <= set(LINK_TRANSPORTS):
        raise ConfigError(f"--transports {transports!r}: give shm, tcp or both with a comma between")
    before = read_hardware(out) if out is not None and out.exists() else None
    url = admin_url(admin)
    asked = {"bytes": parse_size(size, "size"), "runs": runs}
    links = _links(ask(f"{url}/admin/state", lambda found: isinstance(found["workers"], list))["workers"], ways)

    def measure(ends: dict[str, Any]) -> LinkReport:
        report = _ask(url, ends | asked)
        if before is not None and out is not None:
            before.require_model(report.model, report.fingerprint, out)
        return report

    reports, missed = _measured(links, measure)
    if not reports:
        raise NotAnswered(f"no link could be measured: {missed[0].reason}")
    meanings = [meaning for report in reports for meaning in meanings_of(report)]
    if json != "-":
        _show(reports, meanings, missed)
    write_json({"links": reports, "meaning": meanings, "not_measured": missed}, json)
    if out is not None:
        whole = add_to_file(out, hardware_of(reports))
        if json != "-":
            _say(f"{out} has {len(whole.links)} links, and the classes {', '.join(whole.names) or '(none yet)'}")


def _links(workers: Sequence[dict[str, Any]], ways: Sequence[str]) -> list[dict[str, Any]]:
    """The ends of each link that handoffs may take, once for each transport."""
    gives, takes = (Role.PREFILL, Role.MIXED), (Role.DECODE, Role.MIXED)
    pairs = [
        (first["id"], second["id"])
        for first, second in permutations(sorted(workers, key=lambda worker: str(worker["id"])), 2)
        if first["role"] in gives and second["role"] in takes
    ]
    if not pairs:
        raise NotAnswered(
            f"there are {len(workers)} workers, and none that may hand over to another: that takes one that prefills "
            "(prefill or mixed) and another that decodes (decode or mixed)"
        )
    return [{"from": first, "to": second, "transport": way} for first, second in pairs for way in ways]


def _ask(url: str, fields: dict[str, Any]) -> LinkReport:
    found = ask(f"{url}/admin/links", lambda answer: bool(answer["push_s"]), fields)
    return msgspec.convert(found, LinkReport)


def _measured(
    links: Sequence[dict[str, Any]], measure: Callable[[dict[str, Any]], LinkReport]
) -> tuple[list[LinkReport], list[Missed]]:
    """With a bar; a link whose workers are busy is tried again at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    reports, refusals = {}, {}
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task("links", total=len(links))
        waiting = list(range(len(links)))
        for again in range(_TRIES):
            if again and waiting:
                time.sleep(_AGAIN_S)
            for place in list(waiting):
                ends = links[place]
                bar.update(shown, description=f"{ends['from']} to {ends['to']}, {ends['transport']}")
                try:
                    reports[place] = measure(ends)
                except NotAnswered as error:
                    if error.code is None:
                        raise
                    refusals[place] = str(error)
                    if error.code == "busy" and again < _TRIES - 1:
                        continue
                waiting.remove(place)
                bar.advance(shown)
    missed = [
        Missed(source=links[place]["from"], target=links[place]["to"], transport=links[place]["transport"], reason=why)
        for place, why in sorted(refusals.items())
        if place not in reports
    ]
    return [reports[place] for place in sorted(reports)], missed


def meanings_of(report: LinkReport, prompts: Iterable[int] = PROMPTS) -> list[Meaning]:
    """What a link adds to prompts of these lengths."""
    link, found = LinkCost(report.latency_s, report.bytes_per_s), []
    for tokens in prompts:
        prefill_s, exposed_s = prefill_and_rest(report.cost, link, tokens, report.chunk_tokens, report.kv_token_bytes)
        size = tokens * report.kv_token_bytes
        found.append(
            Meaning(
                source=report.source,
                target=report.target,
                transport=report.transport,
                prompt_tokens=tokens,
                kv_bytes=size,
                prefill_s=prefill_s,
                transfer_s=report.latency_s + size / report.bytes_per_s,
                exposed_s=exposed_s,
                share=exposed_s / prefill_s if prefill_s else 0.0,
                within_context=tokens <= report.context,
            )
        )
    return found


def hardware_of(reports: Sequence[LinkReport]) -> Hardware:
    """As the hardware file has it."""
    links = tuple(
        LinkFile(
            source=one.source,
            target=one.target,
            transport=one.transport,
            latency_s=one.latency_s,
            bytes_per_s=one.bytes_per_s,
            same_machine=one.same_machine,
        )
        for one in reports
    )
    here = conditions()
    transfers = tuple(
        TransferFile(
            source=one.source,
            target=one.target,
            transport=one.transport,
            conditions=here,
            bytes=one.bytes,
            seconds=one.push_s,
            reserve_s=one.reserve_s,
            block_s=one.block_s,
        )
        for one in reports
    )
    first = reports[0]
    return Hardware(links=links, model=first.model, fingerprint=first.fingerprint, measured=Measured(links=transfers))


def _show(reports: Sequence[LinkReport], meanings: Sequence[Meaning], missed: Sequence[Missed]) -> None:
    first = reports[0]
    _say(f"{first.model}: {first.kv_token_bytes:,} bytes of KV a token; medians of {len(first.push_s)} pushes")
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("from", "to", "transport", "machine"):
        table.add_column(heading, no_wrap=True)
    for heading in ("latency ms", "GB/s", "push ms", "least", "most", "MB a push"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in reports:
        table.add_row(
            one.source,
            one.target,
            one.transport,
            "same" if one.same_machine else "another",
            f"{one.latency_s * 1e3:.2f}",
            f"{one.bytes_per_s / 1e9:.2f}",
            *(f"{1e3 * seconds:.2f}" for seconds in (median(one.push_s), min(one.push_s), max(one.push_s))),
            f"{one.bytes / 1e6:.1f}",
        )
    print_whole(table)
    shown = _telling(reports)
    meant = Table(box=box.SIMPLE_HEAD)
    for heading in ("link", "transport"):
        meant.add_column(heading, no_wrap=True)
    for heading in ("prompt tokens", "KV MB", "prefill s", "transfer ms", "exposed ms", "of prefill"):
        meant.add_column(heading, justify="right", no_wrap=True)
    for report in shown:
        for meaning in meanings:
            if (meaning.source, meaning.target, meaning.transport) == (report.source, report.target, report.transport):
                meant.add_row(f"{meaning.source} to {meaning.target}", meaning.transport, *_cells(meaning))
        meant.add_section()
    print_whole(meant)
    _say(
        "The first token leaves before the KV does: TTFT is the prefill (alone, and queueing not counted), and the "
        "second token waits for what is exposed. Chunks are pushed while the next is computed, so over a fast link "
        "that is the last chunk and the latency."
    )
    if any(not one.within_context for one in meanings):
        _say(f"* longer than the model's context of {first.context:,} tokens")
    if len(shown) < len(reports):
        _say(f"of {len(reports)} links, the fastest and the slowest; all are in --json")
    for one_missed in missed:
        _say(f"not measured, {one_missed.source} to {one_missed.target}, {one_missed.transport}: {one_missed.reason}")


def _cells(meaning: Meaning) -> tuple[str, ...]:
    return (
        f"{meaning.prompt_tokens:,}" + "*" * (not meaning.within_context),
        f"{meaning.kv_bytes / 1e6:,.1f}",
        f"{meaning.prefill_s:.3f}",
        f"{meaning.transfer_s * 1e3:.1f}",
        f"{meaning.exposed_s * 1e3:.1f}",
        f"{meaning.share:.1%}",
    )


def _telling(reports: Sequence[LinkReport]) -> Sequence[LinkReport]:
    """All of a few links, or the two ends of many."""
    if len(reports) <= _FEW:
        return reports
    by_rate = sorted(reports, key=lambda one: one.bytes_per_s)
    return by_rate[-1], by_rate[0]


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
