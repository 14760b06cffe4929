"""What lies in a place of a tier: counted by model, tenant and codec, checked, or forgotten.

No more than a handful of blocks is in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress

from msgspec import Struct
from msgspec.structs import replace

from bascule.errors import ConfigError
from bascule.kv.hashing import salt_of
from bascule.kv.store.base import Fault
from bascule.kv.store.description import MOST_BYTES, Description, is_description, read
from bascule.kv.store.folder import Head
from bascule.kv.store.record import InvalidRecord, Label, inspect, label, model_digest, tenant_digest
from bascule.kv.store.shelves import Shelf
from bascule.types import BlockHash

LEAST_DIGITS = 8
"""Of a digest, for a model or tenant to be found by its beginning."""
NOBODY = ""
"""Whose blocks those are that all share."""


class Holding(Struct):
    """Blocks of one model and tenant in one codec; `model` is the digest of its fingerprint in hex, `tenant` that of
    the salt, empty for what all share."""

    model: str
    tenant: str
    codec: str
    blocks: int = 0
    bytes: int = 0
    name: str = ""
    """What the model was served as, and the type of its KV; empty where no place says so."""
    dtype: str = ""


class Stock(Struct, kw_only=True):
    """What a place holds, by what the heads of its blocks say."""

    blocks: int = 0
    bytes: int = 0
    holdings: list[Holding] = []
    faults: dict[str, int] = {}
    """Blocks that do not look like records, or cannot be read, by reason."""
    models: dict[str, Description] = {}
    """What the place says of models, by their digests in hex. They are neither blocks nor bytes here."""


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
    for name, head in _heads(shelf):
        if told := _described(shelf, name, head):
            stock.models[model_digest(told.fingerprint).hex()] = told
            continue
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
        key = (*_whose(found), found.codec)
        holding = holdings.setdefault(key, Holding(*key))
        holding.blocks += 1
        holding.bytes += head.size
    stock.holdings = [holdings[key] for key in sorted(holdings)]
    stock.faults = dict(sorted(faults.items()))
    return stock


def name_models(stocks: Sequence[Stock]) -> None:
    """Let all holdings say what their models are called, by what any of the places says of them."""
    models = {digest: told for stock in stocks for digest, told in stock.models.items()}
    for stock in stocks:
        for holding in stock.holdings:
            if told := models.get(holding.model):
                holding.name, holding.dtype = told.name, told.layout.dtype


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
            fault = _fault(name, data)
            if fault is None:
                whole = not is_description(name)
                result.blocks += whole
                result.valid += whole
                continue
            result.blocks += 1
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


def models_called(stocks: Sequence[Stock], text: str) -> set[str]:
    """The models of which there are blocks and that are meant by `text`: a fingerprint, the name that they were served
    as (`name_models`), or eight or more of the digits that one's digest begins with.

    Raises ConfigError for digits that several begin with.
    """
    names = {holding.model: holding.name for stock in stocks for holding in stock.holdings}
    exact = model_digest(text).hex()
    if exact in names:
        return {exact}
    return {digest for digest, name in names.items() if text and name == text} or _beginning(names, text, "model")


def tenants_called(stocks: Sequence[Stock], text: str) -> set[str]:
    """The tenant of whom there are blocks and whose `cache_salt` is `text`, or whose digest begins with these digits.

    Less than eight are no beginning: they may be somebody's whole `cache_salt`. Raises ConfigError for digits that
    several begin with.
    """
    owned = {holding.tenant for stock in stocks for holding in stock.holdings} - {NOBODY}
    exact = tenant_digest(salt_of(text)).hex()
    return {exact} if exact in owned else _beginning(owned, text, "tenant")


def _beginning(digests: Iterable[str], text: str, kind: str) -> set[str]:
    found = {digest for digest in digests if len(text) >= LEAST_DIGITS and digest.startswith(text.lower())}
    if len(found) > 1:
        listed = "".join(f"\n  {digest}" for digest in sorted(found))
        raise ConfigError(f"--{kind} could be any of {len(found)} {kind}s; write more of its digits:{listed}")
    return found


def forget(shelf: Shelf, models: AbstractSet[str] | None = None, tenants: AbstractSet[str] | None = None) -> int:
    """Drop all blocks of a place, valid or not, or those of some models, some tenants or both, as `Holding` names them;
    returns how many. What is said of a model goes with all that is left of it."""
    if models == set() or tenants == set():
        return 0
    if models is None and tenants is None:
        return sum(_drop(shelf, page) for page in shelf.names())
    dropped = 0
    for found in _labels(shelf):
        model, tenant = _whose(found)
        if is_description(found.name) and tenants is not None:
            continue
        if (models is None or model in models) and (tenants is None or tenant in tenants):
            dropped += _drop(shelf, [found.name])
    return dropped


def _drop(shelf: Shelf, names: Sequence[BlockHash]) -> int:
    """Forget; returns how many of them were blocks."""
    shelf.drop([name for name in names if is_description(name)])
    return shelf.drop([name for name in names if not is_description(name)])


def _described(shelf: Shelf, name: BlockHash, head: Head | Fault) -> Description | None:
    """What this says of a model, if that is what it is for."""
    if not is_description(name) or isinstance(head, Fault) or head.size > MOST_BYTES:
        return None
    data = shelf.read(name)
    return read(name, data) if isinstance(data, bytes) else None


def _whose(found: Label) -> tuple[str, str]:
    """The model and the tenant, as `Holding` names them."""
    return found.model.hex(), found.tenant.hex() if any(found.tenant) else NOBODY


def _heads(shelf: Shelf) -> Iterator[tuple[BlockHash, Head | Fault]]:
    for page in shelf.names():
        for name, head in zip(page, shelf.heads(page), strict=True):
            if head is not None:
                yield name, head


def _labels(shelf: Shelf) -> Iterator[Label]:
    """What the blocks that look like records say of themselves, under the names that they are stored by."""
    for name, head in _heads(shelf):
        if isinstance(head, Head):
            with suppress(InvalidRecord):
                yield replace(label(head.data, head.size), name=name)
