"""What a tier says of the models whose blocks it has: a small record beside them that operators read.

It is stored, found again, evicted and cleared as a block is, and no prompt has its name. The digest of a fingerprint
stands in every block; which model that is, only this says. Who can write to a tier can write anything here.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from blake3 import blake3
from msgspec import Meta, Struct

from bascule.kv.store.record import InvalidRecord, Payload, model_digest, name_in_tiers, pack, payload_of, unpack
from bascule.types import BlockHash, KVLayout, ModelCard

MOST_BYTES = 4096
"""Of such a record."""
_CODEC = "description"
"""None of the codecs: no worker takes what is said of blocks for one."""
_MARK = blake3(b"", derive_key_context="bascule 1 description of a model").digest(8)
_LONGEST = 200


class Description(Struct, frozen=True):
    """A model as its workers served it last."""

    fingerprint: Annotated[str, Meta(min_length=1, max_length=_LONGEST)]
    name: Annotated[str, Meta(min_length=1, max_length=_LONGEST)]
    layout: KVLayout


def description_name(model: bytes) -> BlockHash:
    """What the description of the model with this digest is called in the tiers."""
    return name_in_tiers(BlockHash(_MARK + model[: 16 - len(_MARK)]))


def is_description(name: BlockHash) -> bool:
    """Whether what a tier has under this name describes a model, and is no block."""
    return name_in_tiers(name).startswith(_MARK)


def describe(card: ModelCard) -> bytes | None:
    """What is to be kept of a model; None for one whose name is too long or not fit for a screen."""
    told = Description(card.fingerprint, card.name, card.layout)
    if not _is_shown(told):
        return None
    name = description_name(model_digest(card.fingerprint))
    record = pack(name, card.fingerprint, (), Payload(_CODEC, msgspec.json.encode(told)))
    return record if read(name, record) == told else None


def read(name: BlockHash, record: bytes) -> Description | None:
    """What a record says of the model that it is of; None if it is damaged, or says nothing that may be shown."""
    if len(record) > MOST_BYTES:
        return None
    try:
        told = msgspec.json.decode(payload_of(name, record).data, type=Description)
        if not _is_shown(told):
            return None
        unpack(name, told.fingerprint, (), record)
    except (InvalidRecord, msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return told if name == description_name(model_digest(told.fingerprint)) else None


def _is_shown(told: Description) -> bool:
    return all(text.isprintable() for text in (told.fingerprint, told.name, told.layout.dtype))
