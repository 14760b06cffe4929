"""`bascule kv`: what lies in the tiers of the KV store, whether it is whole, and how to be rid of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from bascule.cli.report import write_json
from bascule.errors import ConfigError
from bascule.kv.store.inventory import (
    LEAST_DIGITS,
    NOBODY,
    Stock,
    audit,
    forget,
    models_called,
    name_models,
    take_stock,
    tenants_called,
)
from bascule.kv.store.shelves import Room, Shelf, disk_shelf, host_shelf, remote_shelves

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_MOST_LISTED = 20
_OR_NONE = {"model": "", "tenant": ", or say --untenanted for those that belong to none"}
_TAKES = {
    "model": f"give the name that it was served as, its fingerprint, or {LEAST_DIGITS} or more of the digits shown",
    "tenant": f"give {LEAST_DIGITS} or more of the digits shown, or its cache_salt",
}

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
Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Failure:
    """A place that could not be looked at, and what to do."""

    shelf: Shelf
    error: str


@app.command
def stats(*, places: Where = Places(), json: Json = None) -> None:
    """Count blocks and bytes by model, tenant and codec; the blocks of requests with a `cache_salt` are a tenant's.

    Only the beginning of each block is read. Exit code 1 if one of several places could not be looked at.

    Example: bascule kv stats --host --disk /var/cache/kv --remote redis://host1,host2

    Parameters
    ----------
    json
        File to write the figures to, `-` for standard output.
    """
    found, failed = _looked_at(places, lambda shelf: (take_stock(shelf), shelf.room()))
    name_models([stock for _, (stock, _) in found])
    if json != "-":
        _show_stocks(found)
    _write([{**_place(shelf), **_plain(stock), **_plain(room)} for shelf, (stock, room) in found], failed, json)
    sys.exit(bool(failed))


@app.command
def verify(
    *, places: Where = Places(), drop: Annotated[bool, Parameter(negative=())] = False, json: Json = None
) -> None:
    """Read and check every block; exit code 1 if one that is not valid was found and left, or a place not looked at.

    Checked are form, version, length, checksum, and that a block is the one that it is stored as.

    Example: bascule kv verify --disk /var/cache/kv --drop

    Parameters
    ----------
    drop
        Remove the blocks that are not valid.
    json
        File to write the figures to, `-` for standard output.
    """
    found, failed = _looked_at(places, lambda shelf: audit(shelf, drop))
    if json != "-":
        table = _table("tier", "place", "blocks", "valid", "not valid", "dropped")
        for shelf, result in found:
            faults = ", ".join(f"{count} {reason}" for reason, count in result.faults.items())
            table.add_row(*_names(shelf), str(result.blocks), str(result.valid), faults or "0", str(result.dropped))
        Console().print(table)
    _write([{**_place(shelf), **_plain(result)} for shelf, result in found], failed, json)
    sys.exit(bool(failed) or any(result.left for _, result in found))


@app.command
def clear(
    *,
    places: Where = Places(),
    model: str | None = None,
    tenant: str | None = None,
    untenanted: Annotated[bool, Parameter(negative=())] = False,
    yes: Annotated[bool, Parameter(negative=())] = False,
    json: Json = None,
) -> None:
    """Forget all blocks, or those of one model or tenant. What is not a block of Bascule's stays.

    Exit code 1 if there are no blocks of that model or tenant.

    Example: bascule kv clear --disk /var/cache/kv --model smollm2 --yes

    Parameters
    ----------
    model
        Forget only the blocks of this model: the name that it was served as (with all fingerprints that were served
        under it), its fingerprint, or eight or more of the digits that `bascule kv stats` shows.
    tenant
        Forget only the blocks of this tenant: eight or more of the digits that `bascule kv stats` shows, or its
        `cache_salt`.
    untenanted
        Forget only the blocks that belong to no tenant, those of requests without a `cache_salt`.
    yes
        Do it; nothing is asked.
    json
        File to write the figures to, `-` for standard output.
    """
    asked = {kind: text for kind, text in (("model", model), ("tenant", tenant)) if text is not None}
    for kind, text in asked.items():
        if not text:
            raise ConfigError(f"--{kind} is empty; leave it out to forget the blocks of all {kind}s{_OR_NONE[kind]}")
    if untenanted and tenant is not None:
        raise ConfigError("--untenanted and --tenant exclude each other; clear one after the other")
    with _opened(places) as shelves:
        for shelf in shelves:
            shelf.check()
        if not yes:
            listed = ", ".join(f"{shelf.tier} ({shelf.label})" for shelf in shelves)
            of = [f"that {kind}" for kind in asked] + ["no tenant"] * untenanted
            which = "the blocks of " + " and ".join(of) if of else "all blocks"
            raise ConfigError(f"this would forget {which} of {listed}; add --yes to do it")
        stocks = [take_stock(shelf) for shelf in shelves] if asked else []
        name_models(stocks)
        models = models_called(stocks, model) if model is not None else None
        tenants = tenants_called(stocks, tenant) if tenant is not None else {NOBODY} if untenanted else None
        holdings = [holding for stock in stocks for holding in stock.holdings]
        if models is not None:
            _tell("model", models, {holding.model: holding.name for holding in holdings})
        if tenants is not None and not untenanted:
            _tell("tenant", tenants, {holding.tenant: "" for holding in holdings if holding.tenant != NOBODY})
        found = [(shelf, forget(shelf, models, tenants)) for shelf in shelves]
    if json != "-":
        table = _table("tier", "place", "dropped")
        for shelf, dropped in found:
            table.add_row(*_names(shelf), str(dropped))
        Console().print(table)
    _write([{**_place(shelf), "dropped": dropped} for shelf, dropped in found], (), json)
    if (asked or untenanted) and not any(dropped for _, dropped in found):
        _say("nothing was dropped: no blocks are of all that was asked for; `bascule kv stats` shows what is there")
        sys.exit(1)


@contextmanager
def _opened(places: Places) -> Iterator[list[Shelf]]:
    """The places, none of them looked at yet; raises ConfigError if none is given, or one malformed."""
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


def _looked_at(
    places: Places, look: Callable[[Shelf], Figures]
) -> tuple[list[tuple[Shelf, Figures]], Sequence[Failure]]:
    """What is seen of each place, and the places that fail; raises ConfigError if all of them do."""
    found: list[tuple[Shelf, Figures]] = []
    failed: list[Failure] = []
    with _opened(places) as shelves:
        for shelf in shelves:
            try:
                shelf.check()
                found.append((shelf, look(shelf)))
            except ConfigError as error:
                failed.append(Failure(shelf, str(error)))
    if not found:
        raise ConfigError("\n".join(failure.error for failure in failed))
    return found, failed


def _tell(kind: str, meant: Collection[str], there: Mapping[str, str]) -> None:
    """Say which models or tenants are meant, or if none is, which ones there are, by digest and name.

    What was asked for is not repeated: it may be a tenant's secret.
    """
    if not meant:
        shown = [f"{digest[:LEAST_DIGITS]} {name}".rstrip() for digest, name in there.items()]
        listed = ", ".join(shown[:_MOST_LISTED]) or "none"
        more = f" and {len(there) - _MOST_LISTED} more" if len(there) > _MOST_LISTED else ""
        _say(f"--{kind}: no blocks here are of that {kind}; {_TAKES[kind]}; there are {listed}{more}")
        return
    if len(meant) > 1:
        _say(f"{len(meant)} {kind}s are called so:")
    for digest in sorted(meant):
        _say(f"{kind} {digest} {there[digest]}".rstrip())


def _write(figures: Sequence[dict[str, object]], failed: Sequence[Failure], json: str | None) -> None:
    """Write the figures, and say which places are not among them."""
    missing = [{**_place(failure.shelf), "error": failure.error} for failure in failed]
    write_json({"places": figures, "failed": missing}, json)
    for failure in failed:
        _say(f"not in these figures: {failure.error}")


def _say(line: str) -> None:
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def _show_stocks(found: Sequence[tuple[Shelf, tuple[Stock, Room]]]) -> None:
    console = Console()
    for shelf, (stock, room) in found:
        line = f"{shelf.tier}, {shelf.label}: {stock.blocks} blocks, {_size(stock.bytes)}"
        if room.free_bytes is not None and room.capacity_bytes is not None:
            line += f"; the place has {_size(room.capacity_bytes)}, {_size(room.free_bytes)} of it free"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        if stock.holdings or stock.faults:
            console.print(_holdings(stock))


def _holdings(stock: Stock) -> Padding:
    table = _table("model", "dtype", "digest", "tenant", "codec", "blocks", "size")
    for holding in sorted(stock.holdings, key=lambda each: each.name):
        codec = holding.codec if holding.codec.isprintable() else ascii(holding.codec)
        whose = (holding.model[:LEAST_DIGITS], holding.tenant[:LEAST_DIGITS] or "-")
        of = (escape(holding.name) or "-", escape(holding.dtype) or "-")
        table.add_row(*of, *whose, escape(codec), str(holding.blocks), _size(holding.bytes))
    for reason, count in stock.faults.items():
        table.add_row(f"not a record: {reason}", "", "", "", "", str(count), "")
    return Padding(table, (0, 0, 0, 2), expand=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        number = column in ("blocks", "valid", "dropped", "size")
        short = number or column in ("tier", "digest", "tenant")
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=short)
    return table


def _names(shelf: Shelf) -> tuple[str, str]:
    return str(shelf.tier), escape(shelf.label)


def _place(shelf: Shelf) -> dict[str, object]:
    return {"tier": str(shelf.tier), "place": shelf.label}


def _plain(figures: object) -> dict[str, object]:
    found: dict[str, object] = msgspec.to_builtins(figures)
    return found


def _size(size: int) -> str:
    """Bytes for people."""
    power = min(max(0, size.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / 1024**power:.1f} {_UNITS[power]}" if power else f"{size} bytes"
