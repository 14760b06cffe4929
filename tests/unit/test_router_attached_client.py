"""An attached server's streams, good and bad: what becomes tokens, what becomes a failure, and of which kind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import fake_server as fake
import httpx
import pytest
from fake_server import DONE, STREAM, Body, FakeServer, Part, chunk, chunks_of, event, response, streamed, tokens_after
from msgspec import structs

from bascule.clock import VirtualClock
from bascule.kv.hashing import salt_of
from bascule.router.attached.client import AttachedClient, Served
from bascule.router.attached.exchange import MAX_EVENT, Trouble
from bascule.types import Epoch, FinishReason, RequestId, SamplingParams, TokenLogprobs, WorkerId
from bascule.wire import Failed, StepTokens, Submit, TokenItem, WorkerMessage

SERVED = Served(model="theirs", context=fake.CONTEXT, vocab=fake.VOCAB, eos=frozenset({fake.END}))
PROMPT = (10, 20, 30)
WAIT = 20.0


class Rig:
    """A client, its fake server, and all it has delivered."""

    def __init__(self, server: FakeServer, http: httpx.AsyncClient) -> None:
        self.server = server
        self.messages: list[WorkerMessage] = []
        self.troubles: list[Trouble] = []
        self.clock = VirtualClock()
        self.client = AttachedClient(
            http,
            SERVED,
            WorkerId("attached-0"),
            Epoch("e"),
            self.messages.append,
            self.troubles.append,
            self.clock.now,
        )

    @property
    def items(self) -> list[TokenItem]:
        return [item for message in self.messages if isinstance(message, StepTokens) for item in message.items]

    @property
    def failure(self) -> Failed | None:
        return next((message for message in self.messages if isinstance(message, Failed)), None)

    async def run(self, sampling: SamplingParams, generated: tuple[int, ...] = ()) -> None:
        """One submission to its end."""
        self.client.submit(submission(sampling, generated))
        await self.idle()

    async def idle(self) -> None:
        async with asyncio.timeout(WAIT):
            while self.client.running:
                await asyncio.sleep(0.001)


def submission(sampling: SamplingParams, generated: tuple[int, ...] = ()) -> Submit:
    return Submit(request=RequestId("r"), attempt=1, prompt=PROMPT, generated=generated, sampling=sampling)


def greedy(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 6, "temperature": 0.0} | changes))  # type: ignore[arg-type]


def attached(test: Callable[[Rig], Awaitable[None]]) -> None:
    async def run() -> None:
        server = FakeServer()
        await server.start()
        async with httpx.AsyncClient(base_url=server.url, timeout=None) as http:
            await test(Rig(server, http))
        await server.stop()

    asyncio.run(asyncio.wait_for(run(), 4 * WAIT))


def test_a_stream_becomes_tokens_with_positions_and_the_engine_s_own_finish() -> None:
    async def test(rig: Rig) -> None:
        await rig.run(greedy())
        assert [item.token for item in rig.items] == tokens_after(PROMPT, 6)
        assert [(item.position, item.attempt) for item in rig.items] == [(index, 1) for index in range(6)]
        assert [item.finish for item in rig.items] == [None] * 5 + [FinishReason.LENGTH]
        assert rig.failure is None

    attached(test)


def test_every_parameter_is_spelt_out_for_servers_have_defaults_of_their_own() -> None:
    async def test(rig: Rig) -> None:
        await rig.run(greedy(stop_token_ids=(1,), min_tokens=3, logit_bias=((7, -5.0),)), (40, 50))
        body = rig.server.bodies[0]
        assert body["prompt"] == [*PROMPT, 40, 50]
        assert (body["max_tokens"], body["min_tokens"], body["top_k"]) == (4, 1, -1)
        assert (body["temperature"], body["top_p"], body["min_p"], body["repetition_penalty"]) == (0.0, 1.0, 0.0, 1.0)
        assert body["stop_token_ids"] == [1, fake.END]
        assert body["logit_bias"] == {"7": -5.0}
        assert (body["model"], body["stream"], body["return_token_ids"]) == ("theirs", True, True)

    attached(test)


@pytest.mark.parametrize(("seed", "sent"), [(5, 5), (2**64 - 2, -2), (2**64 - 1, 2**63 - 1), (2**63, -(2**63))])
def test_seeds_are_sent_as_signed_numbers_and_never_as_the_one_that_means_none(seed: int, sent: int) -> None:
    async def test(rig: Rig) -> None:
        await rig.run(SamplingParams(max_tokens=2, seed=seed))
        assert rig.server.bodies[0]["seed"] == sent

    attached(test)


def test_a_salt_is_passed_on_as_a_secret_of_its_own_and_none_is_not() -> None:
    async def test(rig: Rig) -> None:
        for salt in (b"", salt_of("ann"), salt_of("ben")):
            rig.client.submit(structs.replace(submission(greedy()), salt=salt))
            await rig.idle()
        sent = [body.get("cache_salt") for body in rig.server.bodies]
        assert sent == [None, salt_of("ann").hex(), salt_of("ben").hex()]

    attached(test)


def test_a_server_that_does_not_look_at_salts_gets_no_request_with_one() -> None:
    async def test(rig: Rig) -> None:
        rig.client._served = structs.replace(SERVED, keeps_apart=False)
        rig.client.submit(structs.replace(submission(greedy()), salt=salt_of("ann")))
        await rig.idle()
        assert not rig.server.bodies and not rig.items
        assert rig.failure is not None and rig.failure.retryable and "cache_salt" in rig.failure.message
        assert rig.failure.unfit == "cache_salt"

    attached(test)


def test_a_greedy_output_goes_on_behind_the_tokens_that_are_out() -> None:
    async def test(rig: Rig) -> None:
        whole = tokens_after(PROMPT, 6)
        await rig.run(greedy(), tuple(whole[:2]))
        assert [item.token for item in rig.items] == whole[2:]
        assert [item.position for item in rig.items] == [2, 3, 4, 5]

    attached(test)


@pytest.mark.parametrize("changes", [{"temperature": 0.5}, {"presence_penalty": 0.1}, {"frequency_penalty": -1.0}])
def test_what_cannot_be_continued_exactly_is_not_even_sent(changes: dict[str, float]) -> None:
    async def test(rig: Rig) -> None:
        await rig.run(greedy(**changes), (40,))
        assert rig.failure is not None and rig.failure.retryable and "cannot go on" in rig.failure.message
        assert not rig.server.bodies

    attached(test)


def test_an_end_token_ends_the_output_and_the_server_must_agree() -> None:
    async def test(rig: Rig) -> None:
        third = tokens_after(PROMPT, 3)[2]
        await rig.run(greedy(stop_token_ids=(third,)))
        assert len(rig.items) == tokens_after(PROMPT, 3).index(third) + 1
        assert rig.items[-1].finish is FinishReason.STOP

    attached(test)


def test_a_finish_that_comes_in_a_chunk_of_its_own_and_several_tokens_in_one_are_fine() -> None:
    async def test(rig: Rig) -> None:
        tokens = tokens_after(PROMPT, 6)
        rig.server.answer = lambda body: streamed(
            [chunk(tokens[:4], 4, 3), chunk(tokens[4:], 6, 3), chunk([], 6, 3, "length")]
        )
        await rig.run(greedy())
        assert [item.token for item in rig.items] == tokens and rig.failure is None

    attached(test)


def test_cached_tokens_and_log_probabilities_come_through() -> None:
    def answer(body: Body) -> list[Part]:
        assert body["logprobs"] == 2 and body["return_tokens_as_token_ids"] is True
        named = {"token_id:65": -0.5, "token_id:66": -1.5, "token_id:67": -9999.0}
        logprobs = {"tokens": ["token_id:65"], "token_logprobs": [-0.5], "top_logprobs": [named]}
        one = chunk([65], 1, 3, "length", logprobs=logprobs)
        one["usage"]["prompt_tokens_details"] = {"cached_tokens": 2}
        return streamed([one])

    async def test(rig: Rig) -> None:
        rig.server.answer = answer
        await rig.run(greedy(max_tokens=1, logprobs=2))
        assert rig.items[0].logprobs == TokenLogprobs(-0.5, ((65, -0.5), (66, -1.5)))
        assert rig.items[0].cached_tokens == 2

    attached(test)


def test_cancelling_closes_the_stream_and_says_nothing_more() -> None:
    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: [STREAM, *(event(one) for one in chunks_of(body)[:2]), None]
        rig.client.submit(submission(greedy()))
        async with asyncio.timeout(WAIT):
            while len(rig.items) < 2:
                await asyncio.sleep(0.001)
            rig.client.cancel(RequestId("r"), 0)
            rig.client.cancel(RequestId("r"), 1)
            while not rig.server.left:
                await asyncio.sleep(0.001)
        await rig.idle()
        assert rig.failure is None and len(rig.items) == 2

    attached(test)


def test_headers_that_do_not_come_are_waited_for_until_the_request_is_cancelled() -> None:
    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: [None]
        rig.client.submit(submission(greedy()))
        await asyncio.sleep(0.2)
        assert rig.client.running == 1 and not rig.messages
        rig.client.stop()
        await rig.idle()

    attached(test)


def test_slow_headers_and_slow_pieces_are_no_fault() -> None:
    async def test(rig: Rig) -> None:
        raw = b"".join(
            part for part in streamed(chunks_of({**BODY, "prompt": list(PROMPT)})) if isinstance(part, bytes)
        )
        head = len(STREAM)
        pieces = [raw[start : start + 9] for start in range(head, len(raw), 9)]
        rig.server.answer = lambda body: [0.1, raw[:20], 0.05, raw[20:head], *pieces]
        await rig.run(greedy())
        assert [item.token for item in rig.items] == tokens_after(PROMPT, 6)

    attached(test)


BODY: Body = {"prompt": list(PROMPT), "max_tokens": 6, "min_tokens": 0, "stop_token_ids": []}
GOOD = chunks_of(BODY)


def _changed(at: int, /, **fields: object) -> list[Body]:
    """The good stream with one choice changed."""
    return [one if i != at else {**one, "choices": [one["choices"][0] | fields]} for i, one in enumerate(GOOD)]


BAD_STREAMS: dict[str, tuple[list[Part], str, int]] = {
    "no token ids": (streamed(_changed(2, token_ids=None)), "no token ids", 2),
    "a token repeated": (streamed([*GOOD[:3], GOOD[2], *GOOD[3:]]), "counts 3 output tokens, but has sent 4", 3),
    "a token missing": (streamed([*GOOD[:2], *GOOD[3:]]), "counts 4 output tokens, but has sent 3", 2),
    "no counts": (streamed([{**one, "usage": None} for one in GOOD]), "does not count", 0),
    "another prompt": (streamed([chunk([65], 1, 4)]), "counts 4 prompt tokens, where 3 were sent", 0),
    "another prompt, by ids": (streamed(_changed(0, prompt_token_ids=[1, 10, 20])), "another prompt", 0),
    "a token of another vocabulary": (streamed(_changed(1, token_ids=[300])), "vocabulary", 1),
    "a negative token": (streamed(_changed(1, token_ids=[-1])), "vocabulary", 1),
    "a token that is no integer": (streamed(_changed(1, token_ids=[1.5])), "no chunk of a completion", 1),
    "another choice": (streamed(_changed(1, index=1)), "choice 1", 1),
    "malformed JSON": ([STREAM, event(GOOD[0]), b"data: {nonsense\n\n", DONE], "no chunk of a completion", 1),
    "JSON of a hundred thousand brackets": ([STREAM, b"data: " + b"[" * 100_000 + b"\n\n"], "no chunk", 0),
    "an event that never ends": ([STREAM, b"data: " + b"x" * (MAX_EVENT + 10), b"\n\n"], "event of more than", 0),
    "no choices": ([STREAM, event({"object": "pong"}), DONE], "without choices", 0),
    "a stop that nothing asked for": (streamed([*GOOD[:2], chunk([65], 3, 3, "stop")]), "where nothing", 2),
    "HTML": ([response("200 OK", b"<html>welcome</html>", kind="text/html")], "text/html", 0),
    "tokens after the end": (streamed([*GOOD, chunk([65], 7, 3)]), "went on after", 5),
    "a redirect": ([response("307 Temporary Redirect", b"", "Location: http://example.test/")], "307", 0),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_an_answer_that_cannot_be_right_fails_the_attempt_and_costs_the_server_its_trust(name: str) -> None:
    parts, said, taken = BAD_STREAMS[name]

    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: parts
        await rig.run(greedy())
        assert rig.failure is not None and said in rig.failure.message
        assert rig.failure.retryable and rig.troubles[0].doubt
        assert [item.token for item in rig.items] == tokens_after(PROMPT, 6)[:taken]
        assert all(item.finish is None for item in rig.items)

    attached(test)


def test_a_server_that_ignores_the_end_tokens_is_found_out() -> None:
    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: streamed(chunks_of({**body, "stop_token_ids": []}))
        await rig.run(greedy(stop_token_ids=(tokens_after(PROMPT, 1)[0],)))
        assert rig.failure is not None and "which ends the output (stop)" in rig.failure.message
        assert not rig.items

    attached(test)


BROKEN_STREAMS: dict[str, tuple[list[Part], str]] = {
    "cut off": ([STREAM, event(GOOD[0]), event(GOOD[1])], "without finishing"),
    "cut off in an event": ([STREAM, event(GOOD[0]), event(GOOD[1])[:20]], "without finishing"),
    "done too early": ([STREAM, event(GOOD[0]), DONE], "without finishing"),
    "an error in the stream": (
        [STREAM, event(GOOD[0]), event({"error": {"message": "out of memory"}})],
        "out of memory",
    ),
    "aborted": (streamed([GOOD[0], chunk([65], 2, 3, "abort")]), "abort"),
    "500": ([response("500 Internal Server Error", b'{"error": {"message": "bug"}}')], "500: bug"),
    "502 in HTML": ([response("502 Bad Gateway", b"<html>nginx</html>", kind="text/html")], "502: <html>nginx"),
    "no answer": ([], "connection"),
}


@pytest.mark.parametrize("name", BROKEN_STREAMS)
def test_a_stream_that_breaks_can_go_on_elsewhere(name: str) -> None:
    parts, said = BROKEN_STREAMS[name]

    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: parts
        await rig.run(greedy())
        assert rig.failure is not None and rig.failure.retryable and said in rig.failure.message
        assert not any(item.finish for item in rig.items)

    attached(test)


@pytest.mark.parametrize(
    ("status", "headers", "retryable", "rest_s"),
    [
        ("429 Too Many Requests", ["Retry-After: 7"], True, 7.0),
        ("429 Too Many Requests", ["Retry-After: 86400"], True, 30.0),
        ("429 Too Many Requests", ["Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"], True, 1.0),
        ("503 Service Unavailable", [], True, 1.0),
        ("400 Bad Request", [], False, 0.0),
        ("404 Not Found", [], False, 0.0),
        ("413 Payload Too Large", [], False, 0.0),
    ],
)
def test_what_a_status_means(status: str, headers: list[str], retryable: bool, rest_s: float) -> None:
    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: [response(status, b'{"error": {"message": "so it is"}}', *headers)]
        await rig.run(greedy())
        assert rig.failure is not None and "so it is" in rig.failure.message
        assert (rig.failure.retryable, rig.troubles[0].rest_s) == (retryable, rest_s)

    attached(test)


def test_a_refused_connection_fails_the_attempt_at_once() -> None:
    async def test(rig: Rig) -> None:
        await rig.server.stop()
        await rig.run(greedy())
        assert rig.failure is not None and rig.failure.retryable and rig.troubles[0].doubt

    attached(test)


def test_a_server_that_names_tokens_by_their_text_could_never_take_a_request_for_log_probabilities() -> None:
    async def test(rig: Rig) -> None:
        by_text = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}
        rig.server.answer = lambda body: streamed([chunk([65], 1, 3, "length", logprobs=by_text)])
        await rig.run(greedy(max_tokens=1, logprobs=1))
        assert rig.failure is not None and (rig.failure.unfit, rig.failure.retryable) == ("logprobs", True)
        assert "leave logprobs out" in rig.failure.message
        assert not rig.troubles[0].doubt and not rig.troubles[0].rest_s

    attached(test)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]},
        {"tokens": ["token_id:66"], "token_logprobs": [-0.5], "top_logprobs": [{"token_id:66": -0.5}]},
        {"tokens": ["token_id:65"], "token_logprobs": [-0.5], "top_logprobs": [{}]},
    ],
)
def test_log_probabilities_that_cannot_be_told_apart_or_are_missing_are_refused(logprobs: object) -> None:
    async def test(rig: Rig) -> None:
        rig.server.answer = lambda body: streamed([chunk([65], 1, 3, "length", logprobs=logprobs)])
        await rig.run(greedy(max_tokens=1, logprobs=1))
        assert rig.failure is not None and "log prob" in rig.failure.message and not rig.items

    attached(test)
