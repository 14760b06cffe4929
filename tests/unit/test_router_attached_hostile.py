"""What a hostile server sends is trouble with that server alone: headers, bodies and numbers that nobody sane sends."""

from __future__ import annotations

import gzip
import json
import logging
import math
from collections.abc import Callable

import pytest
import test_router_attached_keeper as kept
from fake_server import CONTEXT, VOCAB, FakeServer, chunk, response, streamed, tokens_after
from test_router_attached_client import GOOD, Rig, attached, greedy

from bascule.router.attached.exchange import MAX_ANSWER
from bascule.types import TokenLogprobs, WorkerId

NOWHERE = response("301 Moved Permanently", b"", "Location: ftp:\\")
MODELS = json.dumps({"data": [{"id": "theirs", "max_model_len": CONTEXT}]}).encode()
LONG = MODELS + b" " * MAX_ANSWER

Spoil = Callable[[FakeServer], None]

SPOILT: dict[str, tuple[Spoil, str]] = {
    "health leads nowhere": (lambda server: setattr(server, "health", NOWHERE), "InvalidURL"),
    "models lead nowhere": (lambda server: setattr(server, "models", NOWHERE), "InvalidURL"),
    "a long health page": (lambda server: setattr(server, "health", response("200 OK", LONG)), "more than"),
    "a long list of models": (lambda server: setattr(server, "models", response("200 OK", LONG)), "more than"),
    "compressed health": (
        lambda server: setattr(server, "health", response("200 OK", gzip.compress(LONG), "Content-Encoding: gzip")),
        "encoded (gzip)",
    ),
    "compressed models": (
        lambda server: setattr(server, "models", response("200 OK", gzip.compress(LONG), "Content-Encoding: gzip")),
        "encoded (gzip)",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_answer_to_a_heartbeat_costs_one_server_its_trust_and_nothing_else(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, said = SPOILT[name]

    async def test(rig: kept.Rig) -> None:
        await rig.until(lambda: rig.member)
        spoil(rig.server)
        await rig.until(lambda: said in caplog.text)
        rig.server.reset()
        await rig.until(lambda: rig.member and not rig.member.resting)
        assert await rig.complete() == tokens_after((1, 2, 3), 5)

    with caplog.at_level(logging.WARNING):
        kept.attached(test)
    lines = [record.getMessage() for record in caplog.records if said in record.getMessage()]
    assert "gets no requests" in lines[0] and "\n" not in lines[0]
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("name", [name for name in SPOILT if "models" in name])
def test_a_server_that_begins_so_is_waited_for(name: str) -> None:
    spoil, said = SPOILT[name]

    async def test(rig: kept.Rig) -> None:
        await rig.until(lambda: said in rig.membership.stages.get(WorkerId("attached-0"), ""))
        rig.server.reset()
        await rig.until(lambda: rig.member)

    kept.attached(test, spoil)


@pytest.mark.parametrize("cookie", ["a=b", "a=\xff"])
def test_no_cookie_is_kept(cookie: str) -> None:
    def spoil(server: FakeServer) -> None:
        head, _, body = response("200 OK", MODELS, "Set-Cookie: ?").partition(b"?")
        server.models = head + cookie.encode("latin-1") + body

    async def test(rig: kept.Rig) -> None:
        await rig.until(lambda: rig.member)
        assert await rig.complete() == tokens_after((1, 2, 3), 5)
        assert rig.server.heads and not any("cookie" in head.lower() for head in rig.server.heads)

    kept.attached(test, spoil)


@pytest.mark.parametrize("context", [-1, 0, 10**30])
def test_a_context_that_cannot_be_is_refused(context: int) -> None:
    models = response("200 OK", json.dumps({"data": [{"id": "theirs", "max_model_len": context}]}).encode())
    assert "max_model_len" in kept.refused(lambda server: setattr(server, "models", models))


def test_a_completion_that_leads_nowhere_ends_one_request() -> None:
    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: [NOWHERE]
        await rig.run(greedy())
        assert rig.failure is not None and rig.failure.retryable and "InvalidURL" in rig.failure.message
        assert rig.troubles[0].doubt

    attached(test)


def test_a_compressed_stream_is_refused_by_name() -> None:
    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: [response("200 OK", b"", "Content-Encoding: br", kind="text/event-stream")]
        await rig.run(greedy())
        assert rig.failure is not None and "encoded (br)" in rig.failure.message

    attached(test)


@pytest.mark.parametrize(("said", "taken"), [(-7, 0), (2, 2), (10**30, 3)])
def test_a_count_of_cached_tokens_is_kept_within_the_prompt(said: int, taken: int) -> None:
    async def test(rig: Rig) -> None:
        details = {"prompt_tokens_details": {"cached_tokens": said}}
        rig.server.answer = lambda body: streamed([{**one, "usage": one["usage"] | details} for one in GOOD])
        await rig.run(greedy())
        assert rig.failure is None and {item.cached_tokens for item in rig.items} == {taken}

    attached(test)


async def _with_logprobs(rig: Rig, name: str, logprob: float, other: str, least: float) -> None:
    given = {"tokens": [name], "token_logprobs": [logprob], "top_logprobs": [{other: least}]}
    rig.server.answer = lambda body: streamed([chunk([65], 1, 3, "length", logprobs=given)])
    await rig.run(greedy(max_tokens=1, logprobs=1))


@pytest.mark.parametrize(
    ("name", "logprob", "other", "least", "said"),
    [
        ("token_id:65", 5e300, "token_id:65", -0.5, "5e+300 as a log probability"),
        ("token_id:65", -0.5, "token_id:65", 0.5, "0.5 as a log probability"),
        ("token_id:" + "9" * 5000, -0.5, "token_id:65", -0.5, "names tokens"),
        ("token_id:65", -0.5, "token_id:" + "9" * 5000, -0.5, "names tokens"),
        ("token_id:65", -0.5, f"token_id:{VOCAB}", -0.5, "the vocabulary has"),
    ],
    ids=["high", "others high", "long", "others long", "unknown"],
)
def test_impossible_log_probabilities_are_refused(
    name: str, logprob: float, other: str, least: float, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(rig: Rig) -> None:
        await _with_logprobs(rig, name, logprob, other, least)
        assert rig.failure is not None and said in rig.failure.message and not rig.items
        assert len(rig.failure.message) < 400

    attached(test)
    assert not any(record.exc_info for record in caplog.records)


def test_a_log_probability_that_was_rounded_up_is_certainty() -> None:
    async def test(rig: Rig) -> None:
        await _with_logprobs(rig, "token_id:65", 0.001, "token_id:65", -9999.0)
        assert [item.logprobs for item in rig.items] == [TokenLogprobs(0.0, ((65, -math.inf),))]

    attached(test)


def test_an_unforeseen_error_ends_one_request_and_leaves_none_hanging() -> None:
    async def test(rig: Rig) -> None:
        def answer(messages: object) -> None:
            raise LookupError("nobody foresaw\nthis")

        rig.client._tell = answer  # type: ignore[method-assign]
        await rig.run(greedy())
        assert rig.failure is not None and "LookupError: nobody foresaw this" in rig.failure.message

    attached(test)
