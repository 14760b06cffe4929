"""The load client: how it counts, what it calls an error, and when its clocks start."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from api_rig import ApiRig, says
from fake_server import DONE, STREAM, Body, FakeServer, Part, event, tokens_after
from openai_rig import answer, refusal

from bascule.api.app import create_app
from bascule.api.calls import Calls
from bascule.api.server import HttpServer
from bascule.api.tls import tls_context
from bascule.bench.answers import Counting
from bascule.bench.endpoint import Endpoint, find
from bascule.bench.load import Offer, Record, Run, Watch
from bascule.bench.load_report import doubts, load_report
from bascule.errors import ConfigError
from bascule.traffic.workloads import Ask, Talk
from bascule.types import FinishReason, Slo
from support.certificates import certify

Answering = Callable[[Body], Iterable[Part]]
SMALL = range(3, 250)


def talk(*prompts: int, output: int = 6, at: float | None = None) -> Talk:
    return Talk((Ask(prompts or (5, 6, 7), output),), at)


def offered(answering: Answering, asked: Iterable[Talk], seen: list[Body] | None = None, **how: Any) -> Run:
    """A run against a fake server, with what `find` has found out about it unless an `endpoint` is made up."""

    async def run() -> Run:
        server = FakeServer()
        server.answer = answering
        await server.start()
        try:
            if how.pop("plain", False):
                endpoint = Endpoint(url=server.url, model="theirs")
            else:
                endpoint = await find(server.url, vocabulary=SMALL)
            server.bodies.clear()
            async with asyncio.timeout(30):
                run = await Offer(endpoint, **({"concurrency": 1} | how)).run(asked)
            if seen is not None:
                seen.extend(server.bodies)
            return run
        finally:
            await server.stop()

    return asyncio.run(run())


def found(answering: Answering, **how: Any) -> Endpoint:
    async def run() -> Endpoint:
        server = FakeServer()
        server.answer = answering
        await server.start()
        try:
            return await find(server.url, vocabulary=SMALL, **how)
        finally:
            await server.stop()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("counts", "way"),
    [
        ({}, Counting.TOKEN_IDS),
        ({"ids": False}, Counting.RUNNING_USAGE),
        ({"ids": False, "usage": "final"}, Counting.LOGPROBS),
        ({"ids": False, "usage": ""}, Counting.LOGPROBS),
        ({"ids": False, "usage": "final", "logprobs": False}, Counting.FINAL_USAGE),
    ],
)
def test_tokens_are_counted_exactly_by_the_best_that_a_server_tells(counts: dict[str, Any], way: Counting) -> None:
    run = offered(lambda body: answer(body, a_chunk=3, **counts), [talk(output=8)])
    (record,) = run.records
    assert (record.error, record.tokens, record.counted_by) == ("", 8, way)
    assert len(record.gaps) <= 2, "a chunk of three tokens is one arrival"
    assert record.tpot == pytest.approx((record.e2e - record.ttft) / 7)
    told = " ".join(doubts(run, text_prompts=False))
    assert ("chunks of unknown size" in told) == (way is Counting.FINAL_USAGE)
    assert "guess" not in told


def test_times_are_those_at_which_tokens_came() -> None:
    def answering(body: Body) -> Iterable[Part]:
        head, *parts = [part for part in answer(body) if isinstance(part, bytes)]
        yield from (head, 0.1)
        for part in parts:
            yield from (part, 0.05)

    (record,) = offered(answering, [talk(output=3)], plain=True).records
    assert record.ttft >= 0.1
    assert len(record.gaps) == 2
    assert min(record.gaps) >= 0.045
    assert record.e2e == pytest.approx(record.ttft + sum(record.gaps))
    assert record.answered >= record.e2e + 0.045, "the usage and the end come behind the last token"


def test_chunks_are_counted_only_where_nothing_else_is_and_that_is_told() -> None:
    run = offered(lambda body: answer(body, ids=False, usage="", logprobs=False), [talk()])
    assert (run.records[0].tokens, run.records[0].counted_by) == (6, Counting.CHUNKS)
    assert "guess" in " ".join(doubts(run, text_prompts=False))


def test_refusals_errors_and_answers_are_told_apart_with_their_messages() -> None:
    def answering(body: Body) -> list[Part]:
        if body["prompt"][0] == 100:
            return refusal("429 Too Many Requests", "full, come later", "Retry-After: 7")
        if body["prompt"][0] == 101:
            return refusal("400 Bad Request", f"{len(body['prompt'])} tokens do not fit into a context of 2")
        return answer(body)

    run = offered(answering, [talk(9), talk(100), talk(101, 5), talk(101, 5, 6), talk(100), talk(10)])
    report = load_report(run, Slo(10.0, 10.0, 10.0))
    assert [report[key] for key in ("requests", "completed", "rejected", "errors")] == [6, 2, 2, 2]
    assert report["rejection_messages"] == [{"message": "status 429: full, come later", "count": 2}]
    (error,) = report["error_messages"]
    assert error == {"message": "status 400: 2 tokens do not fit into a context of 2", "count": 2}
    assert report["slo_missed"] == {"rejected": 2, "error": 2, "ttft": 0, "tpot": 0, "gap": 0}
    assert report["slo_met"] == report["slo_met_by_bound"]["ttft"] == pytest.approx(1 / 3)
    assert report["goodput_per_s"] == pytest.approx(2 / run.wall_s)
    assert run.records[1].retry_after == 7.0


def cut_off(body: Body) -> list[Part]:
    return answer(body)[:-3]


def broken_off(body: Body) -> list[Part]:
    return [*answer(body)[:5], event({"error": {"message": "a worker is gone"}}), DONE]


def miscounted(body: Body) -> list[Part]:
    return [*answer(body)[:-2], event({"choices": [], "usage": {"completion_tokens": 9}}), DONE]


def garbled(body: Body) -> list[Part]:
    return [STREAM, b"data: {not json\n\n", DONE]


def without_tokens(body: Body) -> list[Part]:
    return [STREAM, DONE]


def cut_to_the_context(body: Body) -> list[Part]:
    return answer(body | {"max_tokens": 4})


@pytest.mark.parametrize(
    ("answering", "told"),
    [
        (cut_off, r"without \[DONE\]"),
        (broken_off, "a worker is gone"),
        (miscounted, "6 token ids came, and the usage counts 9"),
        (garbled, "not the stream of a completion"),
        (without_tokens, "no tokens came"),
        (cut_to_the_context, "4 of 6 tokens came .*context"),
        (lambda body: [b"SSH-2.0-hello\r\n"], "not HTTP"),
        (lambda body: [], "status 0"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(answering: Answering, told: str) -> None:
    (record,) = offered(answering, [talk()], plain=True).records
    assert re.search(told, record.error), record.error
    assert not record.rejected


def test_an_output_that_the_model_ends_is_short_where_servers_may_do_so_and_else_an_error() -> None:
    run = offered(lambda body: answer(body, count=2), [talk()])
    assert (run.records[0].error, run.records[0].tokens) == ("", 2)
    assert "1 outputs ended before" in " ".join(doubts(run, text_prompts=False))
    (strict,) = offered(lambda body: answer(body, count=2), [talk()], plain=True).records
    assert "2 of 6 tokens came" in strict.error


def test_a_request_without_an_end_is_given_up() -> None:
    (record,) = offered(lambda body: [STREAM, None], [talk()], plain=True, timeout_s=0.2).records
    assert record.error == "no end within 0.2 s"


def test_a_turn_repeats_what_was_said_before_and_its_answer() -> None:
    seen: list[Body] = []
    asked = Talk((Ask((5, 6), 3), Ask((7,), 2)))
    offered(answer, [asked], seen)
    assert [body["prompt"] for body in seen] == [[5, 6], [5, 6, *tokens_after((5, 6), 3), 7]]


def test_requests_of_an_open_loop_come_at_their_times_though_none_before_them_is_answered() -> None:
    came = 0

    def answering(body: Body) -> Iterable[Part]:
        nonlocal came
        came += 1
        yield STREAM
        while came < 5:
            yield 0.005
        yield from answer(body)[1:]

    times = [0.0, 0.02, 0.02, 0.1, 0.15]
    run = offered(answering, [talk(at=at) for at in times], plain=True, concurrency=None)
    assert [record.error for record in run.records] == [""] * 5
    assert sorted(record.start for record in run.records) == pytest.approx(times)
    assert max(record.ttft for record in run.records) >= 0.15


def test_a_late_client_counts_as_time_to_the_first_token_and_is_told() -> None:
    class Busy(Watch):
        def sent(self) -> None:
            time.sleep(0.3)

    asked = [talk(at=0.0), talk(at=0.01)]
    run = offered(answer, asked, plain=True, concurrency=None, watch=Busy())
    latest = max(run.records, key=lambda record: record.late)
    assert latest.ttft >= latest.late >= 0.25
    assert "the client was short of time" in " ".join(doubts(run, text_prompts=False))


def test_a_run_that_is_stopped_keeps_what_was_measured() -> None:
    stop = asyncio.Event()

    class StopAfterOne(Watch):
        def ended(self, record: Record) -> None:
            stop.set()

    def answering(body: Body) -> list[Part]:
        return [STREAM, None] if body["prompt"][0] == 100 else answer(body)

    asked = [talk(100), talk(9)]
    run = offered(answering, asked, plain=True, concurrency=2, watch=StopAfterOne(), stop=stop)
    assert (len(run.good()), run.unfinished) == (1, 1)
    assert "stopped while" in " ".join(doubts(run, text_prompts=False))


def test_no_talk_begins_after_the_duration() -> None:
    def forever() -> Iterable[Talk]:
        while True:
            yield talk()

    run = offered(answer, forever(), plain=True, duration_s=0.3)
    assert run.records
    late = [talk(at=at) for at in (0.0, 0.1, 5.0)]
    assert len(offered(answer, late, plain=True, concurrency=None, duration_s=1.0).records) == 2


def test_a_server_that_takes_nothing_beyond_openai_is_asked_for_nothing_else() -> None:
    def answering(body: Body) -> list[Part]:
        beyond = {"ignore_eos", "return_token_ids"} & set(body)
        return refusal("400 Bad Request", "unknown field") if beyond else answer(body, usage="final")

    endpoint = found(answering)
    assert (endpoint.ids, endpoint.extras, endpoint.logprobs) == (True, False, True)


def test_a_server_without_token_ids_is_sent_text_of_as_many_words() -> None:
    def answering(body: Body) -> list[Part]:
        return answer(body) if isinstance(body["prompt"], str) else refusal("422 Unprocessable", "prompt: no text")

    seen: list[Body] = []
    run = offered(answering, [talk(5, 6, 7, 8)], seen)
    assert len(seen[0]["prompt"].split()) == 4
    assert "prompts are text" in " ".join(doubts(run, text_prompts=True))


def test_what_a_server_lacks_is_told_before_the_run() -> None:
    def small(body: Body) -> list[Part]:
        wrong = not isinstance(body["prompt"], str) and max(body["prompt"]) > 100
        return refusal("400 Bad Request", "no such token") if wrong else answer(body)

    with pytest.raises(ConfigError, match="--vocabulary LOW:HIGH"):
        found(small)
    with pytest.raises(ConfigError, match=r"does not complete a prompt .*out of order"):
        found(lambda body: refusal("500 Internal", "out of order"))
    with pytest.raises(ConfigError, match="has no model 'ours'; it serves theirs"):
        found(answer, model="ours")
    assert found(answer, model="theirs").model == "theirs"


def test_a_server_behind_tls_and_a_key_is_measured_by_those_who_have_the_key(tmp_path: Path) -> None:
    certify(tmp_path, "one", "-nodes")

    async def run(url: str, key: str | None, verify: bool) -> Run:
        endpoint = await find(url, api_key=key, verify=verify, vocabulary=range(97, 120))
        return await Offer(endpoint, concurrency=1).run([talk(97, 98, 99, output=5)])

    with ApiRig() as rig:
        app = create_app(rig.context, ("the-right-key",))
        tls = tls_context(tmp_path / "one.pem", tmp_path / "one.key")
        server = rig.call(HttpServer.start(app, Calls(), "127.0.0.1", 0, tls))
        rig.backend.script = lambda request: says(
            "abcabcabc"[: request.sampling.max_tokens], finish=FinishReason.LENGTH
        )
        (record,) = asyncio.run(run(server.url, "the-right-key", False)).records
        assert (record.error, record.tokens, record.counted_by) == ("", 5, Counting.TOKEN_IDS)
        for key, verify, told in (
            (None, False, "asks for an API key"),
            ("another-key", False, "asks for an API key"),
            ("the-right-key", True, "certificate"),
        ):
            with pytest.raises(ConfigError, match=told):
                asyncio.run(run(server.url, key, verify))
        rig.call(server.stop())
