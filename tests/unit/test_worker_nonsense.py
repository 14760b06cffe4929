"""What no peer may say, well-formed as it is: it is refused with a reason, and the tokens are those of one engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import zmq
from engine_rig import BLOCK, CARD, reference
from fetch_rig import PEER_ADDRESS, Two, play, prompt_of
from handoff_rig import KEY, PROMPT, SAMPLING, SOURCE, Pair, deliver, pair, verdicts
from msgspec import structs

from bascule.peer_wire import (
    Commit,
    Fetch,
    Fetched,
    HandoffRefused,
    PeerMessage,
    Prepare,
    Renew,
    Reserved,
    TransferEndpoint,
)
from bascule.types import RequestId
from bascule.wire import FetchFrom, Submit
from bascule.worker.arrivals import Arrivals
from bascule.worker.peers import Peers


def test_a_first_token_that_the_model_does_not_have_is_refused() -> None:
    def lie(both: Pair, message: PeerMessage) -> PeerMessage:
        return structs.replace(message, first_token=CARD.vocab) if isinstance(message, Commit) else message

    with pair("loopback", lie) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["engine"]


def test_a_handoff_that_could_never_have_its_blocks_holds_up_nobody() -> None:
    """It would stand at the head of those that wait, until its time was over."""
    with pair("loopback") as both:
        capacity = both.target.most_tokens
        both.loop.run_until_complete(both.run())
        [prepare] = both.sent(Prepare)
        long = structs.replace(prepare, ticket="long", prompt=(1,) * capacity, request=RequestId("long"))
        both.loop.call_soon(both.decode.apply, SOURCE.epoch, long)
        both.loop.run_until_complete(asyncio.sleep(0))
        assert both.decode.promised == 0
        answer = both.to_prefill[-1]
        assert isinstance(answer, HandoffRefused) and answer.kind == "malformed" and str(capacity) in answer.reason


@pytest.mark.parametrize("changes", [{"blocks": (0,)}, {"have_blocks": 1000}])
def test_a_reservation_that_does_not_fit_the_prompt_is_not_used(changes: dict[str, Any]) -> None:
    with pair("loopback", deliver) as both:
        apply = both.prefill.apply

        def bent(message: PeerMessage) -> None:
            apply(structs.replace(message, **changes) if isinstance(message, Reserved) else message)

        both.prefill.apply = bent  # type: ignore[method-assign]
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["aborted"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tokens": tuple([CARD.vocab] * 10 * BLOCK)}, "cannot be a prompt"),
        ({"tokens": tuple([1] * 1000 * BLOCK), "blocks": tuple(range(1000)), "have_blocks": 0}, "cannot be a prompt"),
        ({"endpoints": (TransferEndpoint("tcp", f"127.0.0.1:{2**70}", "elsewhere"),)}, "cannot reach"),
    ],
)
def test_a_fetch_of_what_cannot_be_is_answered_with_its_reason(
    changes: dict[str, Any], word: str, caplog: pytest.LogCaptureFixture
) -> None:
    transport = changes["endpoints"][0].transport if "endpoints" in changes else "loopback"

    async def scenario(two: Two) -> None:
        two.compute(1, prompt_of(1))
        assert await two.fetch([*prompt_of(1), 7], 10 * BLOCK) == 0
        [answer] = [message for message in two.said if isinstance(message, Fetched)]
        assert word in answer.reason and answer.checksums == ()
        assert not [record for record in caplog.records if record.exc_info], "it was foreseen"

    def change(_: Two, message: PeerMessage) -> PeerMessage:
        return structs.replace(message, **changes) if isinstance(message, Fetch) else message

    play(scenario, transport, tamper=change)


def test_a_request_that_comes_twice_is_begun_once_wherever_it_is() -> None:
    class Handoffs:
        def cancel(self, key: Any) -> None:
            raise AssertionError("nothing was refused")

    async def scenario(two: Two) -> None:
        ours = Arrivals(
            two.rigs[0].engine,
            Handoffs(),  # type: ignore[arg-type]
            two.fetches,
            None,
            brought=lambda key, brought: None,
            failed=lambda key, why, again: pytest.fail(why),
            task_ended=lambda task: task.result(),
            wake=lambda: None,
        )
        plain = Submit(
            request=KEY.request,
            attempt=KEY.attempt,
            prompt=PROMPT,
            generated=(),
            sampling=SAMPLING,
            fetch=FetchFrom(PEER_ADDRESS, 48),
        )
        for _ in range(2):
            ours.submit(plain)
        async with asyncio.timeout(20):
            while not two.rigs[0].engine.has(*KEY):
                await asyncio.sleep(0.01)
        ours.submit(plain)
        assert two.rigs[0].engine.load().waiting == 1
        two.rigs[0].engine.cancel(*KEY)

    play(scenario)


def test_to_an_address_that_is_none_nothing_is_sent_and_nothing_breaks(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with zmq.Context() as context:
            peers = Peers(context, "127.0.0.1", SOURCE.worker, SOURCE.epoch)
            for address in ("nowhere", ""):
                peers.send(structs.replace(SOURCE, address=address), Renew(()))
            peers.close()
            assert len(caplog.records) == 2 and "nowhere" in caplog.text

    asyncio.run(run())
