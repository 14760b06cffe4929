"""Streamed answers: events, usage, late errors, and clients that go away."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest
from api_rig import HOLD, WAIT, ApiRig, says

from bascule.errors import Overloaded, WorkerFailure
from bascule.types import FinishReason


@pytest.fixture(scope="module")
def shared() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


@pytest.fixture
def rig(shared: ApiRig) -> Iterator[ApiRig]:
    shared.backend.reset()
    yield shared
    shared.assert_nothing_runs()


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-1] == ""
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [part.removeprefix("data: ") for part in parts[:-1]]


def chunks(response: httpx.Response) -> list[dict[str, object]]:
    """The chunks of a complete stream."""
    *data, done = events(response)
    assert done == "[DONE]"
    return [json.loads(one) for one in data]


def test_a_completion_streams(rig: ApiRig) -> None:
    stream = rig.client.completions.create(model="tiny", prompt="abc", max_tokens=5, stream=True)
    got = [chunk.choices[0] for chunk in stream]
    assert [choice.text for choice in got] == ["a", "b", "c", "a", "b"]
    assert [choice.finish_reason for choice in got] == [None] * 4 + ["length"]


def test_a_chat_streams_and_begins_with_the_role(rig: ApiRig) -> None:
    rig.backend.script = lambda request: says("Paris")
    messages = [{"role": "user", "content": "hi"}]
    stream = list(rig.client.chat.completions.create(model="tiny", messages=messages, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Paris"
    assert stream[-1].choices[0].finish_reason == "stop"
    assert {chunk.object for chunk in stream} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in stream}) == 1


def test_the_last_chunk_has_the_usage_if_asked_for(rig: ApiRig) -> None:
    got = chunks(rig.complete(max_tokens=3, n=2, stream=True, stream_options={"include_usage": True}))
    assert got[-1]["choices"] == []
    usage = got[-1]["usage"]
    assert isinstance(usage, dict)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 6, 9)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert all(chunk["usage"] is None for chunk in got[:-1])


def test_no_chunk_has_usage_unless_asked_for(rig: ApiRig) -> None:
    assert all("usage" not in chunk for chunk in chunks(rig.complete(stream=True)))


def test_continuous_usage_counts_in_every_chunk(rig: ApiRig) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    got = chunks(rig.complete(prompt="aé", max_tokens=3, stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in got] == [1, 2, 3, 3]
    assert [chunk["choices"][0]["text"] for chunk in got[:-1]] == ["a", "", "é"]


def test_token_ids_come_with_every_delta_even_where_no_text_is_final(rig: ApiRig) -> None:
    got = chunks(rig.complete(prompt="é", max_tokens=2, stream=True, return_token_ids=True))
    assert [chunk["choices"][0]["token_ids"] for chunk in got] == [[0xC3], [0xA9]]
    assert [chunk["choices"][0]["text"] for chunk in got] == ["", "é"]


def test_chunks_without_anything_in_them_are_not_sent(rig: ApiRig) -> None:
    got = chunks(rig.complete(prompt="é", max_tokens=2, stream=True))
    assert [chunk["choices"][0]["text"] for chunk in got] == ["é"]


def test_logprobs_stream_with_offsets_that_go_on(rig: ApiRig) -> None:
    got = chunks(rig.complete(max_tokens=3, logprobs=1, stream=True))
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in got] == [[0], [1], [2]]


def test_every_choice_of_a_stream_is_whole_and_has_its_index(rig: ApiRig) -> None:
    texts: dict[int, str] = {}
    for chunk in chunks(rig.complete(prompt=["ab", "xyz"], n=2, max_tokens=4, stream=True, echo=True)):
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {0: "ababab", 1: "ababab", 2: "xyzxyzx", 3: "xyzxyzx"}


def test_a_stop_string_never_shows_in_a_stream(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [*says("one ENtwo END three", finish=FinishReason.LENGTH)]
    got = chunks(rig.complete(stop="END", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in got[:-1]) == "one ENtwo "
    assert got[-2]["choices"][0]["finish_reason"] == "stop"
    assert got[-1]["usage"]["completion_tokens"] == len("one ENtwo END")


def test_an_error_before_the_first_token_is_a_status(rig: ApiRig) -> None:
    rig.backend.refusal = lambda request: Overloaded("too many", retry_after=2.5)
    response = rig.complete(stream=True)
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "3"
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("failure", "message", "code"),
    [
        (WorkerFailure("worker decode-0 died", code="worker_lost"), "worker decode-0 died", "worker_lost"),
        (ZeroDivisionError("inside"), "request id", "internal_error"),
    ],
)
def test_an_error_after_the_first_token_is_an_event_and_no_done_follows(
    rig: ApiRig, failure: Exception, message: str, code: str
) -> None:
    rig.backend.script = lambda request: [*says("half", finish=FinishReason.LENGTH)[:2], failure]
    response = rig.complete(stream=True)
    assert response.status_code == 200
    *_, last = events(response)
    error = json.loads(last)["error"]
    assert message in error["message"]
    assert "inside" not in error["message"]
    assert (error["type"], error["code"]) == ("server_error", code)


def test_the_client_library_raises_for_an_error_event(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [*says("half", finish=FinishReason.LENGTH)[:2], WorkerFailure("died")]
    with pytest.raises(openai.APIError, match="died"):
        list(rig.client.completions.create(model="tiny", prompt="abc", stream=True))


def test_one_failing_choice_cancels_the_others(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [WorkerFailure("died")] if not rig.backend.generations else [HOLD]
    response = rig.complete(n=3)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "died"
    assert [generation.cancelled for generation in rig.backend.generations] == [False, True, True]


def test_one_choice_that_cannot_start_cancels_those_that_have(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [HOLD]
    rig.backend.refusal = lambda request: Overloaded("full", retry_after=1) if request.id.endswith("-2") else None
    with pytest.raises(openai.RateLimitError, match="full"):
        rig.client.completions.create(model="tiny", prompt="abc", n=3)
    rig.assert_nothing_runs()
    assert all(generation.cancelled for generation in rig.backend.generations)


def ask(rig: ApiRig, **fields: object) -> socket.socket:
    """Send a request by hand, so that the connection can be closed at any moment."""
    body = json.dumps({"model": "tiny", "prompt": "abc", **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT)
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_leaves_a_stream_cancels_all_its_generations(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [*says("ab", finish=FinishReason.LENGTH)[:1], HOLD]
    with ask(rig, stream=True, n=3) as connection:
        assert b"200 OK" in connection.recv(1 << 16)
    rig.assert_nothing_runs()
    assert [generation.cancelled for generation in rig.backend.generations] == [True] * 3


def test_a_client_that_leaves_before_its_answer_cancels_all_its_generations(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [HOLD]
    with ask(rig, n=2):
        assert rig.backend.started.wait(WAIT)
    rig.assert_nothing_runs()
    assert all(generation.cancelled for generation in rig.backend.generations)


def test_a_client_that_leaves_while_its_request_waits_withdraws_it(rig: ApiRig) -> None:
    rig.backend.start_blocked = True
    with ask(rig):
        assert rig.backend.started.wait(WAIT)
    assert rig.backend.start_cancelled.wait(WAIT)


def test_a_client_that_closes_its_stream_by_the_library_cancels_it(rig: ApiRig) -> None:
    rig.backend.script = lambda request: [*says("abc", finish=FinishReason.LENGTH)[:2], HOLD]
    stream = rig.client.completions.create(model="tiny", prompt="abc", stream=True)
    next(iter(stream))
    stream.close()
    rig.assert_nothing_runs()
    assert rig.backend.generations[0].cancelled


def test_a_connection_serves_one_stream_after_another(rig: ApiRig) -> None:
    for _ in range(3):
        assert len(chunks(rig.complete(max_tokens=2, stream=True))) == 2
