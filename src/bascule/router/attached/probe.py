"""What a server has to show before a request goes there: the model, its context, its token ids and its tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus

import httpx
import msgspec
from msgspec import UNSET, Struct, structs

from bascule.errors import UNREADABLE, ConfigError, short
from bascule.router.attached.client import Served
from bascule.router.attached.exchange import (
    Chunk,
    Trouble,
    completion_body,
    converse,
    get,
    refusal,
    trouble_of,
    whole,
)
from bascule.router.attached.output import Output
from bascule.types import RequestId, SamplingParams
from bascule.wire import Submit

PROBE_S = 60.0
"""A server that is busy or compiles its first batch may take that long."""

_TEXT = 'The café\'s 東京 menu: 3.14159 €, naïve — "tea"?\n    def price(x):\n        return x ** 2\nИ всё.'
_PROBE_TOKENS = 12
_LONGEST = 1 << 31
"""Tokens of context that no server has."""

_REPLACED = "�"


class Refused(ConfigError):
    """This server cannot be attached; the message says why and what to do."""


class OurModel(Struct, frozen=True, kw_only=True):
    """The model as this cluster knows it."""

    name: str
    """Under which the API serves it."""
    vocab: int
    eos: frozenset[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[Iterable[int]], str]


class _Entry(Struct, frozen=True):
    id: str
    max_model_len: int | None = None
    parent: str | None = None


class _Models(Struct, frozen=True):
    data: list[_Entry]


async def probe(http: httpx.AsyncClient, url: str, ours: OurModel) -> Served:
    """Find out what is served, with four small requests.

    Raises Refused for a server that cannot be used, Trouble for one that does not answer (yet).
    """
    try:
        async with asyncio.timeout(PROBE_S):
            with _asking():
                return await _probe(http, url, ours)
    except TimeoutError:
        raise Trouble(f"did not answer a probe within {PROBE_S:g} s") from None


async def _probe(http: httpx.AsyncClient, url: str, ours: OurModel) -> Served:
    entry = await find_model(http, url, ours.name)
    if entry.max_model_len is None or not 0 < entry.max_model_len < _LONGEST:
        raise Refused(
            f"{url} does not say in /v1/models how long its context is (max_model_len, in tokens); use vLLM, say"
        )
    served = Served(model=entry.id, context=entry.max_model_len, vocab=ours.vocab, eos=ours.eos)
    await _probe_tokens(http, url, served, ours)
    await _probe_tokenizer(http, url, served, ours)
    return structs.replace(served, keeps_apart=await _looks_at_salts(http, served, ours))


async def beat(http: httpx.AsyncClient, url: str, name: str, served: Served) -> None:
    """One heartbeat: alive, and with the same model as before.

    Raises Refused where it is another one, Trouble where there is no answer.
    """
    with _asking():
        async with get(http, "/health") as health:
            if health.status_code not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
                raise Trouble(f"answered {health.status_code} to /health")
            await whole(health)
        entry = await find_model(http, url, name)
    if (entry.id, entry.max_model_len) != (served.model, served.context):
        raise Refused(f"{url} serves {short(entry.id)} with context {entry.max_model_len} now")


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Whatever an answer makes fail becomes Trouble with the one server that gave it."""
    try:
        yield
    except (Refused, Trouble):
        raise
    except Exception as error:
        raise trouble_of(error) from error


async def find_model(http: httpx.AsyncClient, url: str, name: str) -> _Entry:
    """The server's entry for the model that we call `name`: the only one it has, or the one it calls so too.

    Raises Refused where there is none, Trouble where there is none yet, and what the HTTP client makes of the answer.
    """
    async with get(http, "/v1/models") as response:
        if response.status_code != HTTPStatus.OK:
            trouble = await refusal(response)
            if trouble.retryable and not trouble.doubt:
                raise trouble
            raise Refused(f"{url} is no OpenAI-compatible server: /v1/models {trouble.message}")
        body = await whole(response)
    try:
        models = msgspec.json.decode(body, type=_Models)
    except UNREADABLE as error:
        raise Refused(f"{url} is no OpenAI-compatible server: /v1/models cannot be read ({error})") from None
    entries = [entry for entry in models.data if entry.parent is None]
    if not entries:
        raise Trouble("serves no model yet")
    chosen = entries if len(entries) == 1 else [entry for entry in entries if entry.id == name]
    if not chosen:
        names = ", ".join(short(entry.id) for entry in entries[:8])
        raise Refused(f"{url} serves several models ({names}) and none is called {name!r}; choose with --model-name")
    return chosen[0]


async def _probe_tokenizer(http: httpx.AsyncClient, url: str, served: Served, ours: OurModel) -> None:
    """A text has to become the same tokens there as here; servers that do not echo them at least count them."""
    tokens = ours.encode(_TEXT)
    try:
        await _complete(http, served, _TEXT, tokens, 1)
    except Trouble as trouble:
        raise _refused_or_later(
            trouble,
            f"{url} reads a text of {len(tokens)} tokens of {ours.name} differently: it {trouble.message}. Serve the"
            " same model with the same tokenizer in both places",
        ) from trouble


async def _probe_tokens(http: httpx.AsyncClient, url: str, served: Served, ours: OurModel) -> None:
    """Token ids in, token ids out, and their text is what our tokenizer makes of them."""
    tokens = ours.encode(_TEXT)
    try:
        ids, text = await _complete(http, served, tokens, tokens, _PROBE_TOKENS)
    except Trouble as trouble:
        raise _refused_or_later(
            trouble,
            f"{url} cannot be used: it {trouble.message}. It needs token ids in and out of /v1/completions"
            " (return_token_ids) and usage in each chunk: vLLM, SGLang and Bascule have both in recent releases",
        ) from trouble
    expected = ours.decode(ids)
    if _comparable(text) != _comparable(expected):
        raise Refused(
            f"{url} has another tokenizer: tokens {ids} are {short(text)!r} there and {expected!r} in {ours.name}; "
            "serve the same model in both places"
        )


async def _looks_at_salts(http: httpx.AsyncClient, served: Served, ours: OurModel) -> bool:
    """Who knows `cache_salt` refuses an empty one; who does not know it takes the request."""
    body = {"model": served.model, "prompt": ours.encode("a"), "max_tokens": 1, "cache_salt": ""}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code not in (HTTPStatus.OK, HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
            raise await refusal(answer)
        return answer.status_code != HTTPStatus.OK


def _refused_or_later(trouble: Trouble, message: str) -> Exception:
    """A refusal where the server has shown what it is; where it is only busy or broken, another try."""
    return Refused(message) if trouble.doubt or not trouble.retryable else trouble


async def _complete(
    http: httpx.AsyncClient, served: Served, prompt: str | list[int], tokens: list[int], count: int
) -> tuple[list[int], str]:
    """A greedy output of `count` tokens, checked as every output is; returns its ids and its text."""
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    submission = Submit(
        request=RequestId("bascule-probe"), attempt=0, prompt=tuple(tokens), generated=(), sampling=sampling
    )
    output = Output(submission, served.vocab, frozenset())
    ids: list[int] = []
    texts: list[str] = []

    def on_chunk(chunk: Chunk) -> bool:
        ids.extend(item.token for item in output.take(chunk))
        texts.extend(choice.text or "" for choice in (chunk.choices if chunk.choices is not UNSET else ()))
        return False

    await converse(http, completion_body(served.model, prompt, sampling, 0, frozenset()), "bascule-probe", on_chunk)
    ids.append(output.end().token)
    return ids, "".join(texts)


def _comparable(text: str) -> str:
    """Without what detokenisers differ in: the first space, and how often a broken character is marked."""
    return text.replace(_REPLACED, "").strip()
