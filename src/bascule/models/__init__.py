"""Model files: finding them, and reading their shape, tokenizer and chat template (weights are the engine's)."""

from __future__ import annotations

from dataclasses import dataclass

from bascule.models.catalog import Progress
from bascule.models.chat import ChatTemplate
from bascule.models.gguf_file import GgufFile
from bascule.models.gguf_tokenizer import chat_template_from_gguf, tokenizer_from_gguf
from bascule.models.hf_directory import ModelDirectory
from bascule.models.source import ModelSource, SourceKind, resolve
from bascule.models.spec import ModelSpec, spec_from_gguf
from bascule.models.tokenizer import TextTokenizer

__all__ = ["LoadedModel", "load"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model without its weights: all that a router needs, and what a worker begins with."""

    source: ModelSource
    spec: ModelSpec
    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None
    """None for a model that was not made for chat."""


def load(model: str, progress: Progress | None = None) -> LoadedModel:
    """Find `model` (see `source.resolve`), fetching it if need be, and read everything but its weights.

    Raises ModelError, with the remedy, for a model that cannot be found, read or run.
    """
    source = resolve(model, progress)
    if source.kind is SourceKind.GGUF:
        file = GgufFile(source.path)
        where = str(source.path)
        return LoadedModel(
            source=source,
            spec=spec_from_gguf(file),
            tokenizer=tokenizer_from_gguf(file.metadata, where),
            chat_template=chat_template_from_gguf(file.metadata),
        )
    directory = ModelDirectory(source.path)
    return LoadedModel(
        source=source, spec=directory.spec(), tokenizer=directory.tokenizer(), chat_template=directory.chat_template()
    )
