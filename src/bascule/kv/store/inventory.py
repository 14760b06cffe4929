"""What lies in a place of a tier: counted by model, tenant and codec, checked, or forgotten.

No more than a handful of blocks is in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from msgspec import Struct
from msgspec.structs import replace

from bascule.kv.hashing import salt_of
from bascule.kv.store.base import Fault
from bascule.kv.store.folder import Head
from bascule.kv.store.record import InvalidRecord, Label, inspect, label, model_digest, tenant_digest
from bascule.kv.store.shelves import Shelf
from bascule.types import BlockHash

LEAST_DIGITS = 8
"""Of a tenant's digest, for it to be found by its beginning."""


class Holding(Struct):
    """Blocks of one model and tenant in one codec; `model` is the digest of its fingerprint in hex, `tenant` that of
    the salt, empty for what all share."""

    model: str
    tenant: str
    codec: str
    blocks: int = 0
    bytes: int = 0


class Stock(Struct, kw_only=True):
    """What a place holds, by what the heads of its blocks say."""

    blocks: int = 0
    bytes: int = 0
    holdings: list[Holding] = []
    faults: dict[str, int] = {}
    """Blocks that do not look like records, or cannot be read, by reason."""


class Audit(Struct, kw_only=True):
    """What reading every block has shown."""

    blocks: int = 0
    valid: int = 0
    faults: dict[str, int] = {}
    """The others by reason: those of `InvalidRecord`, and a `Fault` where a block could not be read."""
    dropped: int = 0
    left: int = 0
    """Blocks that are not valid and were not dropped."""


def take_stock(shelf: Shelf) -> Stock:
    """Count the blocks of a place; only their heads are read."""
    stock = Stock()
    holdings: dict[tuple[str, str, str], Holding] = {}
    faults: Counter[str] = Counter()
    for _, head in _heads(shelf):
        stock.blocks += 1
        if isinstance(head, Fault):
            faults[str(head)] += 1
            continue
        stock.bytes += head.size
        try:
            found = label(head.data, head.size)
        except InvalidRecord as error:
            faults[error.reason] += 1
            continue
        key = (found.model.hex(), found.tenant.hex() if any(found.tenant) else "", found.codec)
        holding = holdings.setdefault(key, Holding(*key))
        holding.blocks += 1
        holding.bytes += head.size
    stock.holdings = [holdings[key] for key in sorted(holdings)]
    stock.faults = dict(sorted(faults.items()))
    return stock


def audit(shelf: Shelf, drop: bool) -> Audit:
    """Read and check every block of a place; with `drop` forget those that nobody could use.

    A block that this user may not read stays: its owner may.
    """
    result = Audit()
    faults: Counter[str] = Counter()
    for page in shelf.names():
        unusable: list[BlockHash] = []
        for name in page:
            data = shelf.read(name)
            if data is None:
                continue
            result.blocks += 1
            fault = _fault(name, data)
            if fault is None:
                result.valid += 1
                continue
            faults[fault] += 1
            if drop and fault != Fault.DENIED:
                unusable.append(name)
            else:
                result.left += 1
        result.dropped += shelf.drop(unusable)
    result.faults = dict(sorted(faults.items()))
    return result


def _fault(name: BlockHash, data: bytes | Fault) -> str | None:
    if isinstance(data, Fault):
        return str(data)
    try:
        inspect(name, data)
    except InvalidRecord as error:
        return error.reason
    return None


def models_like(shelves: Sequence[Shelf], text: str) -> set[bytes]:
    """The models of which there are blocks, and whose fingerprint is `text` or its digest's hex begins with it."""
    return _like((found.model for found in _labels(shelves)), model_digest(text), text)


def tenants_like(shelves: Sequence[Shelf], text: str) -> set[bytes]:
    """The tenants of whom there are blocks, and whose `cache_salt` is `text` or the digest's hex begins with it.

    Less than eight digits are no beginning: they may be somebody's whole `cache_salt`.
    """
    owned = {found.tenant for found in _labels(shelves) if any(found.tenant)}
    exact = tenant_digest(salt_of(text))
    return _like(owned, exact, text) if len(text) >= LEAST_DIGITS else owned & {exact}


def forget(shelf: Shelf, model: bytes | None = None, tenant: bytes | None = None) -> int:
    """Drop all blocks of a place, valid or not, or those of one model, one tenant or both; returns how many."""
    if model is None and tenant is None:
        return sum(shelf.drop(page) for page in shelf.names())
    return sum(
        shelf.drop([found.name])
        for found in _labels([shelf])
        if model in (None, found.model) and tenant in (None, found.tenant)
    )


def _like(digests: Iterable[bytes], exact: bytes, text: str) -> set[bytes]:
    """Those that are meant: the one whose name is `text`, else those whose hex begins with it."""
    found, prefix = set(digests), text.lower()
    return {exact} if exact in found else {digest for digest in found if digest.hex().startswith(prefix)}


def _heads(shelf: Shelf) -> Iterator[tuple[BlockHash, Head | Fault]]:
    for page in shelf.names():
        for name, head in zip(page, shelf.heads(page), strict=True):
            if head is not None:
                yield name, head


def _labels(shelves: Sequence[Shelf]) -> Iterator[Label]:
    """What the blocks that look like records say of themselves, under the names that they are stored by."""
    for shelf in shelves:
        for name, head in _heads(shelf):
            if isinstance(head, Head):
                with suppress(InvalidRecord):
                    yield replace(label(head.data, head.size), name=name)
