"""In what the model of a worker that would join differs from the cluster's, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass

from bascule.types import ModelCard


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as at the cluster's workers."""

    what: str
    here: object
    there: object
    same: str
    """What all workers are to be started with alike."""


def differences(here: ModelCard, there: ModelCard) -> list[Difference]:
    """All for which a worker with card `here` is refused where the cluster's workers have `there`; empty if none.

    Weights are compared only where nothing else that a fingerprint is made of differs: it would say no more.
    """
    (weights, *codecs), (their_weights, *their_codecs) = (card.fingerprint.split("+") for card in (here, there))
    found = [
        Difference(*row)
        for row in (
            ("dtype", here.layout.dtype, there.layout.dtype, "--engine and --dtype"),
            ("block size", here.layout.block_size, there.layout.block_size, "--block-size"),
            ("KV of", _shape(here), _shape(there), "model"),
            ("vocabulary of", here.vocab, there.vocab, "model"),
            ("context length", here.context, there.context, "--max-model-len"),
        )
        if row[1] != row[2]
    ]
    if not found and here.layout != there.layout:
        found.append(Difference("KV of", _bytes(here), _bytes(there), "release of bascule"))
    if not found and weights != their_weights:
        shown = weights[:16], their_weights[:16]
        found.append(Difference("model fingerprint", *shown, "model files and --quantize"))
    if codecs != their_codecs:
        found.append(Difference("KV codecs", _named(codecs), _named(their_codecs), "--kv-codec and --transfer-codec"))
    return found


def _shape(card: ModelCard) -> str:
    layout = card.layout
    return f"{layout.layers} layers with {layout.kv_heads} heads of {layout.head_dim}"


def _bytes(card: ModelCard) -> str:
    return f"{card.layout.planes} planes of {card.layout.token_bytes} bytes a token"


def _named(codecs: list[str]) -> str:
    return " and ".join(codecs) or "none"
