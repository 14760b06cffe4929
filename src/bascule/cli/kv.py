"""`bascule kv`: what lies in the tiers of the KV store, whether it is whole, and how to be rid of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bascule.cli.report import write_json
from bascule.errors import ConfigError
from bascule.kv.store.inventory import Stock, audit, forget, models_like, take_stock, tenants_like
from bascule.kv.store.shelves import Room, Shelf, disk_shelf, host_shelf, remote_shelves

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_SHOWN_DIGITS = 12
"""Of a model's digest; JSON has all."""

app = App(name="kv", help="Count, check or clear what the tiers of the KV store hold; workers may run meanwhile.")


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where to look; at least one."""

    host: Annotated[bool, Parameter(negative=())] = False
    """The host tier of this user on this machine, in shared memory."""
    disk: Path | None = None
    """Directory that workers have as --kv-disk, without its size."""
    remote: str | None = None
    """Redis or Valkey servers, as workers have them as --kv-remote."""


Where = Annotated[Places, Parameter(name="*")]
Json = Annotated[str | None, Parameter(allow_leading_hyphen=True)]


@app.command
def stats(*, places: Where = Places(), json: Json = None) -> None:
    """Count blocks and bytes by model, tenant and codec; the blocks of requests with a `cache_salt` are a tenant's.

    Only the beginning of each block is read.

    Example: bascule kv stats --host --disk /var/cache/kv --remote redis://host1,host2

    Parameters
    ----------
    json
        File to write the figures to, `-` for standard output.
    """
    with _opened(places) as shelves:
        found = [(shelf, take_stock(shelf), shelf.room()) for shelf in shelves]
    if json != "-":
        _show_stocks(found)
    write_json({"places": [{**_place(shelf), **_plain(stock), **_plain(room)} for shelf, stock, room in found]}, json)


@app.command
def verify(
    *, places: Where = Places(), drop: Annotated[bool, Parameter(negative=())] = False, json: Json = None
) -> None:
    """Read and check every block; exit code 1 if one that is not valid was found and left.

    Checked are form, version, length, checksum, and that a block is the one that it is stored as.

    Example: bascule kv verify --disk /var/cache/kv --drop

    Parameters
    ----------
    drop
        Remove the blocks that are not valid.
    json
        File to write the figures to, `-` for standard output.
    """
    with _opened(places) as shelves:
        found = [(shelf, audit(shelf, drop)) for shelf in shelves]
    if json != "-":
        table = _table("tier", "place", "blocks", "valid", "not valid", "dropped")
        for shelf, result in found:
            faults = ", ".join(f"{count} {reason}" for reason, count in result.faults.items())
            table.add_row(*_names(shelf), str(result.blocks), str(result.valid), faults or "0", str(result.dropped))
        Console().print(table)
    write_json({"places": [{**_place(shelf), **_plain(result)} for shelf, result in found]}, json)
    if any(result.left for _, result in found):
        sys.exit(1)


@app.command
def clear(
    *,
    places: Where = Places(),
    model: str | None = None,
    tenant: str | None = None,
    yes: Annotated[bool, Parameter(negative=())] = False,
    json: Json = None,
) -> None:
    """Forget all blocks, or those of one model or tenant. What is not a block of Bascule's stays.

    Example: bascule kv clear --disk /var/cache/kv --model 3f9a --yes

    Parameters
    ----------
    model
        Forget only the blocks of this model: its fingerprint, or the beginning of what `bascule kv stats` calls it.
    tenant
        Forget only the blocks of this tenant: eight or more of the digits that `bascule kv stats` calls it by, or its
        `cache_salt`.
    yes
        Do it; nothing is asked.
    json
        File to write the figures to, `-` for standard output.
    """
    asked = {kind: text for kind, text in (("model", model), ("tenant", tenant)) if text is not None}
    for kind, text in asked.items():
        if not text:
            raise ConfigError(f"--{kind} is empty; leave it out to forget the blocks of all {kind}s")
    with _opened(places) as shelves:
        if not yes:
            listed = ", ".join(f"{shelf.tier} ({shelf.label})" for shelf in shelves)
            which = "the blocks of that " + " and ".join(asked) if asked else "all blocks"
            raise ConfigError(f"this would forget {which} of {listed}; add --yes to do it")
        meant = {kind: _meant(kind, text, shelves) for kind, text in asked.items()}
        nothing = None in meant.values()
        found = [(shelf, 0 if nothing else forget(shelf, **meant)) for shelf in shelves]
    if json != "-":
        table = _table("tier", "place", "dropped")
        for shelf, dropped in found:
            table.add_row(*_names(shelf), str(dropped))
        Console().print(table)
    write_json({"places": [{**_place(shelf), "dropped": dropped} for shelf, dropped in found]}, json)


@contextmanager
def _opened(places: Places) -> Iterator[list[Shelf]]:
    """The places, all of them reached; raises ConfigError if one cannot be."""
    if not places.host and places.disk is None and places.remote is None:
        raise ConfigError("no place is given; say which with --host, --disk DIR or --remote URLS")
    with ExitStack() as stack:
        shelves: list[Shelf] = []
        if places.host:
            shelves.append(host_shelf())
        if places.disk is not None:
            shelves.append(disk_shelf(places.disk))
        if places.remote is not None:
            shelves += remote_shelves(places.remote)
        for shelf in shelves:
            stack.enter_context(closing(shelf))
        yield shelves


def _meant(kind: str, text: str, shelves: list[Shelf]) -> bytes | None:
    """The one model or tenant that is meant, which is told, None if there are no blocks of it; raises ConfigError if it
    could be several. A tenant's own secret is not repeated."""
    found = {"model": models_like, "tenant": tenants_like}[kind](shelves, text)
    said = f"--model {text}" if kind == "model" else "--tenant"
    if len(found) > 1:
        listed = "".join(f"\n  {digest.hex()}" for digest in sorted(found))
        raise ConfigError(f"{said} could be any of {len(found)} {kind}s; write more of its name:{listed}")
    digest = next(iter(found), None)
    told = f"{kind} {digest.hex()}" if digest else f"there are no blocks of that {kind}; `bascule kv stats` lists them"
    Console(stderr=True).print(told, markup=False, soft_wrap=True)
    return digest


def _show_stocks(found: list[tuple[Shelf, Stock, Room]]) -> None:
    table = _table("tier", "place", "model", "tenant", "codec", "blocks", "size")
    for shelf, stock, _ in found:
        for holding in stock.holdings:
            codec = holding.codec if holding.codec.isprintable() else ascii(holding.codec)
            whose = (holding.model[:_SHOWN_DIGITS], holding.tenant[:_SHOWN_DIGITS] or "-")
            table.add_row(*_names(shelf), *whose, escape(codec), str(holding.blocks), _size(holding.bytes))
        for reason, count in stock.faults.items():
            table.add_row(*_names(shelf), "", "", f"not a record: {reason}", str(count), "")
    console = Console()
    console.print(table)
    for shelf, stock, room in found:
        line = f"{shelf.tier}, {shelf.label}: {stock.blocks} blocks, {_size(stock.bytes)}"
        if room.free_bytes is not None and room.capacity_bytes is not None:
            line += f"; the place has {_size(room.capacity_bytes)}, {_size(room.free_bytes)} of it free"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        number = column in ("blocks", "valid", "dropped", "size")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _names(shelf: Shelf) -> tuple[str, str]:
    return str(shelf.tier), escape(shelf.label)


def _place(shelf: Shelf) -> dict[str, str]:
    return {"tier": str(shelf.tier), "place": shelf.label}


def _plain(figures: object) -> dict[str, object]:
    found: dict[str, object] = msgspec.to_builtins(figures)
    return found


def _size(size: int) -> str:
    """Bytes for people."""
    power = min(max(0, size.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / 1024**power:.1f} {_UNITS[power]}" if power else f"{size} bytes"
