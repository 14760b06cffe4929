"""The card that a worker offers, of its settings and its model's files; whoever only asks needs no engine for it."""

from __future__ import annotations

from msgspec import structs

from bascule.config import EngineConfig, HandoffConfig, ModelConfig, StoreConfig
from bascule.engine.mock import mock_card
from bascule.kv.codecs.choice import fingerprint_with
from bascule.models import LoadedModel
from bascule.models.card import bounded_context, card_of
from bascule.types import KVLayout, ModelCard


def mock_card_of(model: str, loaded: LoadedModel, form: ModelConfig, engine: EngineConfig) -> ModelCard:
    """The mock's, with the context and vocabulary of the model, whose tokenizer the router uses."""
    card = mock_card(
        context=form.max_model_len or loaded.spec.context,
        vocab=loaded.spec.vocab,
        block_size=engine.block_size,
    )
    return structs.replace(card, name=form.model_name or model)


def layout_of(loaded: LoadedModel, form: ModelConfig, engine: EngineConfig) -> KVLayout:
    """How KV lies in memory, known of the model's description alone.

    Raises ConfigError for a context that the model has not.
    """
    if engine.engine == "mock":
        return mock_card(block_size=engine.block_size).layout
    bounded_context(loaded.spec.context, form.max_model_len)
    return loaded.spec.kv_layout(form.dtype, engine.block_size)


def as_offered(card: ModelCard, loaded: LoadedModel, handoff: HandoffConfig, store: StoreConfig) -> ModelCard:
    """An engine's card, marked with the codecs that its KV may have been through and with the vocabulary."""
    allowed = fingerprint_with(card.fingerprint, store.kv_codec, handoff.transfer_codec)
    return structs.replace(card, fingerprint=allowed, tokenizer=loaded.tokenizer.digest)


def offered_card(
    model: str,
    loaded: LoadedModel,
    form: ModelConfig,
    engine: EngineConfig,
    handoff: HandoffConfig,
    store: StoreConfig,
) -> ModelCard:
    """What a worker with these settings would register with, without starting one.

    Reads all weight files once, for their digest. Raises ConfigError for a context that the model has not.
    """
    if engine.engine == "mock":
        return as_offered(mock_card_of(model, loaded, form, engine), loaded, handoff, store)
    card = card_of(
        loaded.spec,
        loaded.source,
        dtype=form.dtype,
        quantize=form.quantize,
        name=form.model_name or model,
        block_size=engine.block_size,
        context=form.max_model_len,
    )
    return as_offered(card, loaded, handoff, store)
