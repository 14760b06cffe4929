"""An OpenAI-compatible server as the load client knows it: where it is, which model, and which words it understands."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import httptools
import httpx
import msgspec

from bascule.bench.answers import Answer, BadAnswer, Counting
from bascule.errors import ConfigError
from bascule.router.attached.exchange import Trouble
from bascule.traffic.workloads import VOCABULARY

_FIND_S = 60.0
"""For each request that finds out what the server is; one that compiles its first batch may take that long."""
_LIMIT = 1 << 20
_READ = 1 << 16
_LOWEST = range(1, 5)
"""Ids that every vocabulary has."""
_WORDS = ("the", "of", "and", "to", "in", "that", "is", "was", "for", "on", "are", "with", "as", "his", "they", "be")


@dataclass(frozen=True)
class Prompt:
    """What has been said so far: token ids, or text where a server takes none."""

    ids: tuple[int, ...] = ()
    text: str = ""

    def asked(self, ids: Sequence[int]) -> Prompt:
        words = "".join(f" {_WORDS[token % len(_WORDS)]}" for token in ids)
        return Prompt((*self.ids, *ids), self.text + words)

    def answered(self, answer: Answer) -> Prompt:
        """With an answer behind it; the ids of one that told none are made up, as many as it had tokens."""
        made_up = (self.ids * (answer.count // max(1, len(self.ids)) + 1))[: answer.count]
        return Prompt((*self.ids, *(answer.tokens or made_up)), self.text + "".join(answer.texts))


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, and how they are put."""

    url: str
    """Without `/v1`."""
    model: str
    api_key: str | None = None
    tls: ssl.SSLContext | None = None
    ids: bool = True
    """Prompts are token ids."""
    extras: bool = True
    """`ignore_eos` and the two that make tokens countable may be asked for, beside what OpenAI has."""
    logprobs: bool = False
    """Are asked for, to count by."""
    exact_lengths: bool = True
    """An output that ends before it was to is an error; else it is only counted as short."""

    def request(self, prompt: Prompt, max_tokens: int) -> bytes:
        """One streamed greedy completion on a connection of its own."""
        options: dict[str, object] = {"include_usage": True}
        body: dict[str, object] = {
            "model": self.model,
            "prompt": prompt.ids if self.ids else prompt.text,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": options,
        }
        if self.extras:
            options["continuous_usage_stats"] = True
            body |= {"ignore_eos": True, "return_token_ids": True}
        if self.logprobs:
            body["logprobs"] = 1
        target = urlsplit(self.url)
        content = msgspec.json.encode(body)
        lines = [
            f"POST {target.path}/v1/completions HTTP/1.1",
            f"Host: {target.netloc}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(content)}",
            "Connection: close",
            *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
        ]
        return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + content

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError."""
        target = urlsplit(self.url)
        port = target.port or (443 if self.tls else 80)
        return await asyncio.open_connection(target.hostname, port, limit=_LIMIT, ssl=self.tls)


async def read_answer(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Read all of a response; raises BadAnswer and OSError."""
    try:
        while not answer.complete and (data := await reader.read(_READ)):
            answer.take(data, time.perf_counter())
    except httptools.HttpParserError as error:
        # Data behind the end of a response is one of these too.
        if not answer.complete:
            raise BadAnswer(f"not HTTP: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, Trouble) as error:
        raise BadAnswer(f"not the stream of a completion: {error}") from error
    answer.check()


async def find(
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    *,
    verify: bool = True,
    vocabulary: range = VOCABULARY,
) -> Endpoint:
    """Find out what is served, and by a few tiny requests what it understands.

    Raises ConfigError for a server that cannot be reached, has no such model or cannot complete a prompt.
    """
    url = _plain(url)
    tls = None
    if url.startswith("https:"):
        tls = ssl.create_default_context()
        if not verify:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    name = await _model(url, model, api_key, tls)
    return await _understood(Endpoint(url=url, model=name, api_key=api_key, tls=tls, exact_lengths=False), vocabulary)


def _plain(url: str) -> str:
    target = urlsplit(url)
    try:
        port_is_right = target.port != 0
    except ValueError:
        port_is_right = False
    if target.scheme not in ("http", "https") or not target.hostname or not port_is_right:
        raise ConfigError(f"{url!r} is no address of a server; write for example http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/completions").removesuffix("/v1")


async def _model(url: str, wanted: str | None, api_key: str | None, tls: ssl.SSLContext | None) -> str:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        # Proxies are left out: what is measured is the server.
        async with httpx.AsyncClient(verify=tls or False, timeout=_FIND_S, trust_env=False) as http:
            response = await http.get(f"{url}/v1/models", headers=headers)
    except (httpx.HTTPError, OSError) as error:
        raise ConfigError(f"cannot reach {url}: {error or type(error).__name__}; is the server running?") from error
    if response.status_code in (401, 403):
        raise ConfigError(f"{url} asks for an API key (status {response.status_code}); give it with --api-key")
    try:
        served = [str(entry["id"]) for entry in msgspec.json.decode(response.content)["data"]]
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        if wanted is not None:
            return wanted
        raise ConfigError(
            f"{url}/v1/models does not list models (status {response.status_code}); say which one with --model, if "
            "this is the right address"
        ) from error
    listed = ", ".join(served[:8]) or "none"
    if wanted is None and len(served) != 1:
        raise ConfigError(f"{url} serves {len(served)} models ({listed}); say which one with --model")
    if wanted is not None and wanted not in served:
        raise ConfigError(f"{url} has no model {wanted!r}; it serves {listed}")
    return wanted or served[0]


async def _understood(endpoint: Endpoint, vocabulary: range) -> Endpoint:
    """The form of request that this server answers, and counts best."""
    probe = (vocabulary[0], vocabulary[-1]) * 2
    refused = ""
    for form in _forms(endpoint):
        try:
            answer = await _tried(form, probe)
        except BadAnswer as error:
            refused = refused or str(error)
            continue
        if not form.ids and await _answers(endpoint, _LOWEST):
            raise ConfigError(
                f"{endpoint.url} takes token ids, but not {vocabulary[0]} or {vocabulary[-1]} ({refused}); give its "
                "vocabulary with --vocabulary LOW:HIGH"
            )
        if answer.counted_by in (Counting.FINAL_USAGE, Counting.CHUNKS):
            told = replace(form, logprobs=True)
            return told if await _answers(told, probe, Counting.LOGPROBS) else form
        return form
    raise ConfigError(f"{endpoint.url} does not complete a prompt of {len(probe)} tokens: {refused}")


async def _answers(endpoint: Endpoint, prompt: Sequence[int], counted_by: Counting | None = None) -> bool:
    """Whether it completes that prompt, and countably so."""
    try:
        answer = await _tried(endpoint, prompt)
    except BadAnswer:
        return False
    return counted_by is None or answer.counted_by is counted_by


def _forms(endpoint: Endpoint) -> Iterable[Endpoint]:
    yield endpoint
    yield replace(endpoint, extras=False)
    yield replace(endpoint, ids=False)
    yield replace(endpoint, ids=False, extras=False)


async def _tried(endpoint: Endpoint, prompt: Sequence[int]) -> Answer:
    """The answer to a tiny request; raises BadAnswer where that form is refused, ConfigError where nothing comes."""
    answer = Answer()
    try:
        async with asyncio.timeout(_FIND_S):
            reader, writer = await endpoint.connect()
            try:
                writer.write(endpoint.request(Prompt().asked(prompt), 4))
                await read_answer(reader, answer)
            finally:
                writer.close()
    except TimeoutError as error:
        raise ConfigError(f"{endpoint.url} did not answer a tiny request within {_FIND_S:g} s") from error
    except OSError as error:
        raise ConfigError(f"cannot reach {endpoint.url}: {error}; is the server running?") from error
    return answer
