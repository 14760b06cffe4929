"""The card of a model as a worker computes it, known from its files before any weights are loaded."""

from __future__ import annotations

from bascule.errors import ConfigError
from bascule.models.fingerprint import fingerprint
from bascule.models.source import ModelSource
from bascule.models.spec import ModelSpec
from bascule.types import ModelCard


def card_of(
    spec: ModelSpec,
    source: ModelSource,
    *,
    dtype: str,
    quantize: str,
    name: str,
    block_size: int,
    context: int | None,
) -> ModelCard:
    """The card of the model called `name`; reads all weight files once, for their digest: a second for some GB.

    `block_size` and `context` (None for the model's own) are in tokens. Raises ConfigError for a context that the model
    has not.
    """
    return ModelCard(
        name=name,
        fingerprint=fingerprint(source, spec, dtype if quantize in ("auto", "none") else f"{dtype} {quantize}"),
        context=bounded_context(spec.context, context),
        vocab=spec.vocab,
        layout=spec.kv_layout(dtype, block_size),
    )


def bounded_context(own: int, asked: int | None) -> int:
    """What is asked for, or else the model's own, in tokens; raises ConfigError for more than that."""
    if asked is None:
        return own
    if not 0 < asked <= own:
        raise ConfigError(f"a context of {asked} tokens was asked for; the model has 1 to {own}")
    return asked
