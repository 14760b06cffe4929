"""An engine with a store side as a worker has them, and a store that waits to be let through."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from threading import Semaphore
from unittest.mock import patch

from engine_rig import BLOCK, Rig, greedy, reference, work

from bascule.engine.core import StepResult
from bascule.engine.sequence import Key
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.base import Store
from bascule.kv.store.forms import Forms
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.tiers import Tiers
from bascule.types import BlockHash, Brought, CostModel, Tier
from bascule.wire import Submit
from bascule.worker import store_side
from bascule.worker.loader import Load
from bascule.worker.store_side import StoreSide

HASHER = BlockHasher("mock", BLOCK)
OUTPUT = 5
Told = list[tuple[Tier, list[BlockHash], list[BlockHash]]]


def prompt_of(family: int, tokens: int = 10 * BLOCK) -> list[int]:
    return [1000 * family + position for position in range(1, tokens + 1)]


class Node:
    """An engine with a store side, as a worker has them; stores outlive it."""

    def __init__(self, stores: Sequence[Store], stack: ExitStack, **kind: object) -> None:
        self.rig = Rig(**kind)  # type: ignore[arg-type]
        stack.callback(self.rig.arena.close)
        self.rig.engine.publishes = True
        self.told: Told = []
        self.loaded: dict[Key, Brought] = {}
        self.wake: Callable[[], None] = lambda: None
        """Called when the engine may have work."""
        card = self.rig.runner.card
        self.tiers = Tiers(stores, self.rig.arena, self.rig.books, card.fingerprint, Forms("none", card.layout))
        self.side = StoreSide(
            self.tiers,
            self.rig.engine,
            self.rig.books,
            self.rig.hasher,
            card.layout,
            lambda tier, stored, removed: self.told.append((tier, list(stored), list(removed))),
            on_loaded=self.loaded.__setitem__,
            wake=lambda: self.wake(),
        )
        self.number = 0

    def submit(self, prompt: Sequence[int], believed: int = 0, salt: bytes = b"") -> tuple[Key, asyncio.Task[None]]:
        """A request's key, and the task at whose end the engine has it."""
        self.number += 1
        asked = work(str(self.number), prompt, greedy(OUTPUT), salt=salt)
        submission = Submit(
            request=asked.request,
            attempt=asked.attempt,
            prompt=asked.prompt,
            generated=(),
            sampling=asked.sampling,
            stored_tokens=believed,
            salt=salt,
        )
        task = self.side.start(submission, lambda _: self.rig.engine.submit(asked))
        return Key(asked.request, asked.attempt), task

    def step(self) -> StepResult:
        result = self.rig.step()
        self.side.computed(self.rig.books.changes().stored)
        self.side.stepped(result)
        return result

    def expected(self, prompt: Sequence[int]) -> list[int]:
        return reference(prompt, greedy(OUTPUT))

    def check(self, key: Key, prompt: Sequence[int]) -> Brought | None:
        """The tokens are the right ones, and what was loaded is part of what was found."""
        outputs, brought = self.rig.outputs[key], self.loaded.get(key)
        assert [each.token for each in outputs] == self.expected(prompt)
        assert sum(brought.tokens.values() if brought is not None else ()) <= outputs[0].cached_tokens
        return brought

    async def rest(self) -> None:
        """Until nothing is loaded or saved any more."""
        while self.side.loading or self.side.saving:
            await asyncio.sleep(0.0002)

    async def complete(self, prompt: Sequence[int], believed: int = 0, salt: bytes = b"") -> Brought | None:
        """Serve one request to its end and check its tokens; what became findable is saved. Where nobody knows what
        computing costs, it waits for its load as long as that takes."""
        with patch.object(store_side, "_UNKNOWN_S", WAIT):
            key, ready = self.submit(prompt, believed, salt)
            await ready
        while self.rig.engine.has_work() or self.side.loading:  # what is loaded late may hold the memory it waits for
            await asyncio.sleep(0)  # what the loader has told
            if self.rig.engine.has_work():
                self.step()
        await self.rest()
        return self.check(key, prompt)

    async def bring(self, prompt: Sequence[int], believed: int = 0) -> int:
        """Have a prompt loaded, and then no more of it; returns how many blocks came into the cache."""
        before = self.rig.books.count_cached(HASHER.chain(prompt))
        with patch.object(store_side, "_UNKNOWN_S", WAIT):
            key, ready = self.submit(prompt, believed)
            await ready
        self.rig.engine.cancel(*key)
        while self.side.loading:
            await asyncio.sleep(0)
        self.side.cancel(key)
        return self.rig.books.count_cached(HASHER.chain(prompt)) - before


LENGTH = 40
PROMPT = prompt_of(1, LENGTH * BLOCK + 2)
KNOWN = CostModel(token_s=0.01)
"""Loading is worth it, and waiting for it, but not for long."""
WAIT = 20.0


class Gated(MemoryStore):
    """Each call for blocks waits until it is let through."""

    def __init__(self, capacity: int = 1 << 20, tier: Tier = Tier.HOST) -> None:
        super().__init__(capacity, tier)
        self.gate = Semaphore(0)
        self.asked: list[list[BlockHash]] = []
        """What it was asked for, one entry a call."""
        self.open = True

    def get(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        self.asked.append(list(names))
        assert self.open or self.gate.acquire(timeout=WAIT)
        return super().get(names)

    def let_all(self) -> None:
        self.open = True
        self.gate.release(1000)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 2 * WAIT))


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)  # what the loader has told by now is heard


def patient(store: Gated, stack: ExitStack) -> None:
    """A prompt's patience begins when the store is asked: a thread may take long to get there, and then all would be
    loaded from the back."""
    wait = Load.wait

    async def waiting(load: Load, patience_s: float) -> None:
        while not (store.asked or load.front.is_set()):
            await asyncio.sleep(0.001)
        await wait(load, patience_s)

    stack.enter_context(patch.object(Load, "wait", waiting))


def endless(stack: ExitStack) -> None:
    """From now on a prompt waits for its load as long as that takes: a thread that stands still for a moment would
    cost it some of what it waits for."""
    wait = Load.wait
    stack.enter_context(patch.object(Load, "expect", lambda *_: None))
    stack.enter_context(patch.object(Load, "wait", lambda load, _: wait(load, WAIT)))


async def gated(store: Gated, stack: ExitStack, **kind: object) -> Node:
    """A node that knows what computing costs, beside a store with the prompt that lets nothing through."""
    await Node([store], stack).complete(PROMPT)
    store.asked.clear()
    store.open = False
    patient(store, stack)
    node = Node([store], stack, **kind)
    node.rig.engine.cost = KNOWN
    return node


async def finish(node: Node, store: Gated) -> None:
    """Nothing is left, once the store lets everything through."""
    store.let_all()
    await node.rest()
    node.rig.assert_idle()
