"""What a server must show before it is attached, and what becomes of one that goes, changes or comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import fake_server as fake
import pytest
from fake_server import CONTEXT, FakeServer, chunk, chunks_of, response, streamed, tokens_after

from bascule.clock import WallClock
from bascule.config import AttachConfig, RoutingConfig
from bascule.errors import ConfigError, InvalidRequest, WorkerFailure
from bascule.kv.hashing import salt_of
from bascule.router.attached import keeper
from bascule.router.attached.keeper import Attachments
from bascule.router.attached.probe import OurModel
from bascule.router.membership import Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView, Member
from bascule.types import Request, RequestId, SamplingParams, WorkerId

ROUTING = RoutingConfig(suspect_after=1.2, dead_after=2.0)
OURS = OurModel(name="ours", vocab=fake.VOCAB, eos=frozenset({fake.END}), encode=fake.encode, decode=fake.decode)


class NoLink:
    """A router's socket that nobody connects to."""

    def send(self, *message: object) -> None:
        raise AssertionError("an attached server has no socket")

    async def serve(self, handler: object, is_member: object) -> None:
        await asyncio.Event().wait()


class Rig:
    """A service in front of one fake server."""

    def __init__(self, server: FakeServer, ours: OurModel) -> None:
        clock = WallClock()
        self.server = server
        self.service = Service(ClusterView(1000), ROUTING, clock)
        self.membership = Membership(NoLink(), self.service, ROUTING, clock)  # type: ignore[arg-type]
        config = AttachConfig(attach=f"{server.url}/v1")
        self.attachments = Attachments(config, ROUTING, ours, self.membership, clock)
        self.outputs: dict[str, list[int]] = {}
        """What has come for each request so far."""

    @property
    def member(self) -> Member | None:
        return self.service.view.members.get(WorkerId("attached-0"))

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        """Looks in every turn of the event loop: what is waited for may be over after a few."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0)

    async def complete(self, name: str = "r", salt: bytes = b"", **sampling: Any) -> list[int]:
        values = {"max_tokens": 5, "temperature": 0.0} | sampling
        request = Request(
            id=RequestId(name), prompt=(1, 2, 3), sampling=SamplingParams(**values), timeout=20.0, salt=salt
        )
        flight = await self.service.start(request)
        tokens = self.outputs[name] = list[int]()
        async for delta in flight:
            tokens.extend(delta.tokens)
        return tokens


def attached(test: Callable[[Rig], Awaitable[None]], spoil: Callable[[FakeServer], None] | None = None) -> None:
    """Run a test while the server is kept attached; what ends that is raised."""

    async def run() -> None:
        server = FakeServer()
        await server.start()
        if spoil is not None:
            spoil(server)
        rig = Rig(server, OURS)
        keeping = [asyncio.create_task(rig.attachments.run()), asyncio.create_task(rig.membership.run())]
        testing = asyncio.ensure_future(test(rig))
        done, _ = await asyncio.wait([*keeping, testing], return_when=asyncio.FIRST_COMPLETED, timeout=30)
        for task in [*keeping, testing]:
            task.cancel()
        await asyncio.gather(*keeping, testing, return_exceptions=True)
        await server.stop()
        assert done
        for task in done:
            task.result()

    asyncio.run(run())


def refused(spoil: Callable[[FakeServer], None]) -> str:
    async def wait(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        raise AssertionError("it was attached")

    with pytest.raises(ExceptionGroup) as caught:
        attached(wait, spoil)
    error = caught.value.exceptions[0]
    assert isinstance(error, ConfigError)
    return str(error)


def test_an_attached_server_is_a_mixed_worker_with_the_server_s_context_and_our_name() -> None:
    async def test(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        card = rig.service.card
        assert card is not None and (card.name, card.context, card.vocab) == ("ours", CONTEXT, fake.VOCAB)
        assert rig.service.kv_tokens == CONTEXT
        assert not rig.service.view.snapshot(0.0).hands_off[rig.member.row]
        assert await rig.complete() == tokens_after((1, 2, 3), 5)
        assert rig.server.bodies[-1]["model"] == "theirs"

    attached(test)


def test_whether_a_server_looks_at_salts_is_found_out() -> None:
    async def knows(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        assert await rig.complete(salt=salt_of("ann")) == tokens_after((1, 2, 3), 5)
        assert rig.server.bodies[-1]["cache_salt"] == salt_of("ann").hex()

    async def knows_not(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        asked = len(rig.server.bodies)
        for index in range(4):
            with pytest.raises(InvalidRequest, match="send no cache_salt"):
                await rig.complete(f"salted {index}", salt=salt_of("ann"))
        assert len(rig.server.bodies) == asked
        assert rig.member is not None and not rig.member.strikes and not rig.member.resting
        assert await rig.complete() == tokens_after((1, 2, 3), 5)

    attached(knows)
    attached(knows_not, lambda server: setattr(server, "knows_salts", False))


def _models(*entries: dict[str, object]) -> bytes:
    return response("200 OK", json.dumps({"data": list(entries)}).encode())


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (response("200 OK", b"<html>hello</html>", kind="text/html"), "cannot be read"),
        (response("404 Not Found", b"nothing here"), "no OpenAI-compatible server: /v1/models answered 404: nothing"),
        (response("401 Unauthorized", b'{"error": {"message": "key?"}}'), "401: key?"),
        (_models({"id": "a", "max_model_len": 9}, {"id": "b", "max_model_len": 9}), r"several models (a, b)"),
        (_models({"id": "a"}), "max_model_len"),
    ],
)
def test_a_list_of_models_that_does_not_do_is_refused(models: bytes, said: str) -> None:
    assert said in refused(lambda server: setattr(server, "models", models))


def test_adapters_are_no_models_and_among_several_our_name_is_chosen() -> None:
    def spoil(server: FakeServer) -> None:
        entries = [{"id": "x", "max_model_len": 5}, {"id": "ours", "max_model_len": 50}, {"id": "l", "parent": "x"}]
        server.models = _models(*entries)

    async def test(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        assert rig.server.bodies[0]["model"] == "ours"

    attached(test, spoil)


def test_a_server_without_token_ids_is_refused_with_what_to_do() -> None:
    def spoil(server: FakeServer) -> None:
        server.answer = lambda body: streamed(
            [{**one, "choices": [one["choices"][0] | {"token_ids": None}]} for one in chunks_of(body)]
        )

    message = refused(spoil)
    assert "return_token_ids" in message and "recent" in message


def test_a_server_that_takes_no_token_ids_is_refused() -> None:
    def spoil(server: FakeServer) -> None:
        bad = response("400 Bad Request", b'{"error": {"message": "prompt must be a string"}}')
        server.answer = lambda body: [bad] if isinstance(body["prompt"], list) else streamed(chunks_of(body))

    assert "prompt must be a string" in refused(spoil)


def test_a_tokenizer_that_reads_texts_differently_is_refused() -> None:
    def spoil(server: FakeServer) -> None:
        def answer(body: fake.Body) -> list[fake.Part]:
            if isinstance(body["prompt"], str):
                return streamed(chunks_of({**body, "prompt": body["prompt"] + "!"}))
            return streamed(chunks_of(body))

        server.answer = answer

    assert "differently" in refused(spoil)


def test_a_tokenizer_that_spells_tokens_differently_is_refused() -> None:
    def spoil(server: FakeServer) -> None:
        server.answer = lambda body: streamed(
            [{**one, "choices": [one["choices"][0] | {"text": "zz"}]} for one in chunks_of(body)]
        )

    assert "another tokenizer" in refused(spoil)


def test_a_server_that_is_not_up_yet_is_waited_for() -> None:
    def spoil(server: FakeServer) -> None:
        server.models = _models()

    async def test(rig: Rig) -> None:
        await rig.until(lambda: "no model yet" in rig.membership.stages.get(WorkerId("attached-0"), ""))
        rig.server.reset()
        await rig.until(lambda: rig.member)

    attached(test, spoil)


def test_a_server_that_dies_is_suspect_then_dead_and_comes_back_as_a_new_epoch() -> None:
    async def test(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        member = rig.member
        assert member is not None
        await rig.server.stop()
        await rig.until(lambda: member.suspect)
        await rig.until(lambda: rig.member is None)
        assert member.epoch in rig.service.view.burned
        await rig.server.start()
        await rig.until(lambda: rig.member)
        assert rig.member is not None and rig.member.epoch != member.epoch
        assert await rig.complete() == tokens_after((1, 2, 3), 5)

    attached(test)


def test_a_server_that_has_another_model_all_at_once_is_let_go_until_it_has_the_first_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper, "_REFUSED_AGAIN_S", 0.5)  # nothing here depends on how long it rests

    async def test(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        rig.server.models = _models({"id": "other", "max_model_len": CONTEXT})
        await rig.until(lambda: rig.member is None)
        asked = len(rig.server.bodies)
        await rig.until(lambda: len(rig.server.bodies) >= asked + 2)
        await asyncio.sleep(0.1)
        assert rig.member is None
        rig.server.reset()
        await rig.until(lambda: rig.member)

    attached(test)


def test_a_wrong_answer_takes_a_server_out_of_use_until_it_has_proved_itself_again() -> None:
    async def test(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        rig.server.answer = lambda body: streamed([chunk([65], 1, 3), chunk([66], 3, 3)])
        asking = asyncio.create_task(rig.complete())
        await rig.until(lambda: rig.member and rig.member.resting)
        rig.server.reset()
        tokens = await asking
        assert tokens[0] == 65 and tokens[1:] == tokens_after((1, 2, 3, 65), 4)
        assert rig.member is not None and not rig.member.resting

    attached(test)


def test_a_server_that_is_full_is_left_alone_for_as_long_as_it_asks() -> None:
    async def test(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        good = rig.server.answer
        full = response("429 Too Many Requests", b'{"error": {"message": "full"}}', "Retry-After: 1")
        answers = iter([lambda body: [full]])
        asked = []

        def answer(body: fake.Body) -> Iterable[fake.Part]:
            """A slow heartbeat has the server probed, which is no matter of the request."""
            if body["prompt"] != [1, 2, 3]:
                return good(body)
            asked.append(body)
            return next(answers, good)(body)

        rig.server.answer = answer
        loop = asyncio.get_running_loop()
        started = loop.time()
        assert await rig.complete() == tokens_after((1, 2, 3), 5)
        assert loop.time() - started > 0.9 and len(asked) == 2

    attached(test)


def test_a_sampled_output_that_has_begun_ends_with_an_error_and_a_greedy_one_waits_for_the_server() -> None:
    async def test(rig: Rig) -> None:
        await rig.until(lambda: rig.member)
        rig.server.answer = lambda body: [*streamed(chunks_of(body))[:3], None]
        sampled = asyncio.create_task(rig.complete("s", temperature=1.0))
        waiting = asyncio.create_task(rig.complete("g"))
        await rig.until(lambda: rig.outputs.get("s") and rig.outputs.get("g"))
        await rig.server.stop()
        with pytest.raises(WorkerFailure, match="send the request again"):
            await sampled
        rig.server.reset()
        await rig.server.start()
        assert await waiting == tokens_after((1, 2, 3), 5)

    attached(test)
