"""Prompts and blocks elsewhere: who has no memory where it is computed keeps none where it is to be decoded."""

from __future__ import annotations

import asyncio

from engine_rig import Rig as EngineRig
from engine_rig import greedy, work
from test_worker_handoff import FakePeers, FakeSender, prefill_side, rig, until

from bascule.config import HandoffConfig
from bascule.engine.core import Work
from bascule.engine.sequence import Key
from bascule.peer_wire import Prepare
from bascule.types import RequestId, SamplingParams

BIG = tuple(range(100, 124))


def test_a_prompt_asks_for_blocks_once_it_has_memory_of_its_own() -> None:
    async def scenario() -> None:
        with rig() as parts:
            peers = FakePeers()
            room = parts.engine.reserve(tuple(range(500, 900)), 31 * 16)
            assert room is not None
            side = prefill_side(parts, peers, FakeSender(), HandoffConfig())
            key = Key(RequestId("r"), 0)
            sampling = SamplingParams(max_tokens=8)
            parts.engine.submit(
                Work(request=key.request, attempt=0, prompt=tuple(range(1, 41)), sampling=sampling, handoff=True)
            )
            for _ in range(20):
                await asyncio.sleep(0)
            assert parts.engine.step().is_empty and not peers.sent, "others hold the memory"
            room.release()
            for progress in parts.engine.step().progress:
                side.progressed(progress)
            await until(lambda: peers.sent)
            assert isinstance(peers.sent[0], Prepare)
            side.cancel(key)
            parts.engine.cancel(*key)
            await until(lambda: not side._by_key)

    asyncio.run(scenario())


def test_with_memory_for_all_that_wait_it_asks_at_once() -> None:
    async def scenario() -> None:
        with rig() as parts:
            peers = FakePeers()
            side = prefill_side(parts, peers, FakeSender(), HandoffConfig())
            key = Key(RequestId("r"), 0)
            parts.engine.submit(
                Work(request=key.request, attempt=0, prompt=tuple(range(1, 41)), sampling=greedy(8), handoff=True)
            )
            await until(lambda: peers.sent)
            assert isinstance(peers.sent[0], Prepare), "no step has been made"
            side.cancel(key)
            parts.engine.cancel(*key)
            await until(lambda: not side._by_key)

    asyncio.run(scenario())


def test_of_those_that_wait_only_so_many_are_secured_as_fit_together_and_they_go_first() -> None:
    engine = EngineRig(blocks=16)
    engine.engine.submit(work("first", BIG, greedy(8), handoff=True))
    assert engine.engine.secure(RequestId("first"), 1)
    engine.engine.submit(work("second", tuple(range(300, 348)), greedy(8), handoff=True))
    assert not engine.engine.secure(RequestId("second"), 1), "both do not fit"
    engine.engine.submit(work("short", range(500, 504), greedy(8), handoff=True, priority=-5))
    assert not engine.engine.secure(RequestId("short"), 1)
    assert engine.engine._scheduler.waiting[0].work.request == "first"
    assert engine.engine.secure(RequestId("first"), 1) and engine.engine.secure(RequestId("nobody"), 1)
    assert engine.engine.check_integrity() == []


def test_slots_count_as_memory_does() -> None:
    engine = EngineRig(blocks=64, sequences=1)
    engine.engine.submit(work("first", BIG, greedy(8), handoff=True))
    assert engine.engine.secure(RequestId("first"), 1)
    engine.engine.submit(work("second", range(300, 312), greedy(8), handoff=True))
    assert not engine.engine.secure(RequestId("second"), 1)
