"""A call as the endpoints understand it: prompts in token ids that fit, parameters, and the form of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from msgspec import Struct

from bascule.api.fields import Fields, wrong_value
from bascule.api.forms import Form
from bascule.api.limits import check_min_tokens, output_limit
from bascule.api.parameters import Parameters
from bascule.types import ModelCard

Text = TypeVar("Text")

MAX_OUTPUTS = 256
"""Most choices of one HTTP request, over all its prompts."""

MAX_TOKENS = 2**31 - 1
"""Largest output that may be asked for; what fits is far less, but numbers up to here can be compared and named."""

TEXT_ONLY = 'may only be {"type": "text"}: this server does not constrain its output.'

LONG_TEXT = 16_384
"""Characters from which on tokenising leaves the event loop, so that it does not stall other requests' streams."""


class Prompt(Struct, frozen=True, kw_only=True):
    """One prompt in token ids; `echo` is the text that its outputs begin with."""

    tokens: tuple[int, ...]
    max_tokens: int
    echo: str = ""


class Call(Struct, frozen=True, kw_only=True):
    """What one HTTP request asks for: `parameters.n` outputs of each prompt."""

    prompts: tuple[Prompt, ...]
    parameters: Parameters
    form: Form


class Served(Struct, frozen=True):
    """The model that answers, and the longest prompt plus output that some worker's KV memory holds (tokens)."""

    card: ModelCard
    kv_tokens: int


def fitted(
    param: str, tokens: Sequence[int], parameters: Parameters, default: int | None, served: Served, echo: str = ""
) -> Prompt:
    """The prompt that came in the field `param`, with the bound on its output (`default` where none was given).

    Raises InvalidRequest where they do not fit.
    """
    max_tokens = output_limit(param, len(tokens), parameters.max_tokens, default, served.card, served.kv_tokens)
    check_min_tokens(parameters.sampling.min_tokens, max_tokens)
    return Prompt(tokens=tuple(tokens), max_tokens=max_tokens, echo=echo)


def check_outputs(prompts: int, n: int) -> None:
    """Refuse more outputs than one request may have."""
    if prompts * n > MAX_OUTPUTS:
        raise wrong_value("n", f"times the number of prompts is {prompts * n}; at most {MAX_OUTPUTS} are allowed.")


async def tokenised(encode: Callable[[Text], list[int]], text: Text, characters: int) -> list[int]:
    """Token ids of a text (or chat), without blocking the event loop for long.

    `characters` are those of all texts in the request.
    """
    if characters < LONG_TEXT:
        return encode(text)
    return await asyncio.to_thread(encode, text)


def refuse_unsupported(fields: Fields, name: str, message: str, harmless: tuple[object, ...] = ()) -> None:
    """Refuse a field that would change the answer in a way this server cannot, unless its value asks for nothing."""
    value = fields.value(name, harmless)
    if value is not None and value not in harmless:
        raise wrong_value(fields.param(name), message)
