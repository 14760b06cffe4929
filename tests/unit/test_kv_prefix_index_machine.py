"""Random histories of workers, channels that lose messages, and the index, against sets that say the same naively."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import NamedTuple

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bascule.kv.hashing import BlockHasher
from bascule.kv.prefix_index import PrefixIndex
from bascule.router.kv_feed import ASK_AGAIN_S, KvFeed
from bascule.types import BlockHash, Epoch, Tier, WorkerId
from bascule.wire import KvEvents, TierChanges

LIFETIME = 5.0
ROWS = range(3)
TIERS = (Tier.DEVICE, Tier.HOST)
HASHER = BlockHasher("model", 1)
PROMPTS = [HASHER.chain(tokens) for tokens in product((0, 1), repeat=3)]
NAMES = sorted({name for prompt in PROMPTS for name in prompt})
CAPACITY = {Tier.DEVICE: 6, Tier.HOST: 3}

rows = st.sampled_from(ROWS)
names = st.lists(st.sampled_from(NAMES), unique=True, max_size=4)
prompts = st.sampled_from(PROMPTS)
Sets = dict[Tier, set[BlockHash]]


class Beat(NamedTuple):
    sequence: int


def nothing() -> Sets:
    return {tier: set() for tier in TIERS}


class Worker:
    """What a worker has, what it has sent, and what a listener of perfect memory would make of what arrived."""

    def __init__(self) -> None:
        self.truth = nothing()
        self.heard = nothing()
        self.expected: dict[BlockHash, float] = {}
        self.sequence = 0
        self.channel: list[KvEvents | Beat] = []

    def send(self, *changes: TierChanges, anew: bool = False) -> None:
        self.sequence += 1
        self.channel.append(
            KvEvents(
                worker=WorkerId("w"), epoch=Epoch("w-1"), sequence=self.sequence, anew=anew, changes=tuple(changes)
            )
        )

    def send_all(self) -> None:
        """An account in several messages, one a tier."""
        parts = [TierChanges(tier, b"".join(self.truth[tier]), b"") for tier in TIERS]
        for number, part in enumerate(parts):
            self.send(part, anew=number == 0)

    def hear(self, message: KvEvents) -> None:
        if message.anew:
            self.heard = nothing()
        for part in message.changes:
            tier = Tier(part.tier)
            gone, come = unpack(part.removed), unpack(part.stored)
            self.heard[tier] = (self.heard[tier] - gone) | come
            if tier is Tier.DEVICE:
                for name in gone | come:
                    self.expected.pop(name, None)
            if len(self.heard[tier]) > CAPACITY[tier]:
                self.heard = nothing()
                return


def unpack(hashes: bytes) -> set[BlockHash]:
    return {BlockHash(hashes[start : start + 16]) for start in range(0, len(hashes), 16)}


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(LIFETIME)
        self.workers: dict[int, Worker] = {}
        self.feeds: dict[int, KvFeed] = {}
        self.now = 0.0

    # ------------------------------------------------------------ workers

    @rule(row=rows)
    def join_or_restart(self, row: int) -> None:
        if row in self.workers:
            self.index.leave(row)
        self.index.join(row, CAPACITY)
        self.workers[row] = Worker()
        self.feeds[row] = KvFeed(self.index, row, Counter())

    @precondition(lambda self: self.workers)
    @rule(row=rows)
    def leave(self, row: int) -> None:
        if row in self.workers:
            self.index.leave(row)
            del self.workers[row], self.feeds[row]

    # ------------------------------------------------------------ what workers do

    @precondition(lambda self: self.workers)
    @rule(row=rows, tier=st.sampled_from(TIERS), stored=names, removed=names)
    def change(self, row: int, tier: Tier, stored: list[BlockHash], removed: list[BlockHash]) -> None:
        if (worker := self.workers.get(row)) is not None:
            gone = worker.truth[tier] & set(removed)
            left = worker.truth[tier] - gone
            room = CAPACITY[tier] - len(left)
            come = [name for name in stored if name not in worker.truth[tier]][:room]
            worker.truth[tier] = left | set(come)
            worker.send(TierChanges(tier, b"".join(come), b"".join(gone)))

    @precondition(lambda self: self.workers)
    @rule(row=rows, name=st.sampled_from(NAMES))
    def move_to_host(self, row: int, name: BlockHash) -> None:
        worker = self.workers.get(row)
        if worker is not None and name in worker.truth[Tier.DEVICE] and len(worker.truth[Tier.HOST]) < 3:
            worker.truth[Tier.DEVICE].remove(name)
            worker.truth[Tier.HOST].add(name)
            worker.send(TierChanges(Tier.DEVICE, b"", name), TierChanges(Tier.HOST, name, b""))

    @precondition(lambda self: self.workers)
    @rule(row=rows)
    def beat(self, row: int) -> None:
        if (worker := self.workers.get(row)) is not None:
            worker.channel.append(Beat(worker.sequence))

    # ------------------------------------------------------------ what arrives

    @precondition(lambda self: any(worker.channel for worker in self.workers.values()))
    @rule(row=rows)
    def lose(self, row: int) -> None:
        if row in self.workers and self.workers[row].channel:
            self.workers[row].channel.pop(0)

    @precondition(lambda self: any(worker.channel for worker in self.workers.values()))
    @rule(row=rows, most=st.integers(1, 3))
    def deliver(self, row: int, most: int) -> None:
        if row in self.workers:
            worker, feed = self.workers[row], self.feeds[row]
            for message in worker.channel[:most]:
                if isinstance(message, Beat):
                    feed.told(message.sequence)
                else:
                    feed.apply(message)
                    worker.hear(message)
            del worker.channel[:most]

    @precondition(lambda self: self.workers)
    @rule(row=rows)
    def catch_up(self, row: int) -> None:
        """Once everything sent has come or been missed, and the worker asked if need be, the index is true."""
        if row in self.workers:
            self.beat(row)
            self.deliver(row, 1_000)
            self.now += ASK_AGAIN_S
            if self.feeds[row].should_ask(self.now):
                self.workers[row].send_all()
                self.deliver(row, 1_000)
            assert self.feeds[row].in_step
            assert self.workers[row].heard == self.workers[row].truth

    # ------------------------------------------------------------ what the router does

    @precondition(lambda self: self.workers)
    @rule(row=rows, prompt=prompts)
    def expect(self, row: int, prompt: list[BlockHash]) -> None:
        if (worker := self.workers.get(row)) is not None:
            self.index.expect(row, prompt, self.now)
            for name in prompt:
                if name not in worker.heard[Tier.DEVICE]:
                    worker.expected.pop(name, None)
                    worker.expected[name] = self.now + LIFETIME
            for name in list(worker.expected)[: -CAPACITY[Tier.DEVICE]]:
                del worker.expected[name]

    @rule(seconds=st.sampled_from([0.5, LIFETIME]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.index.expire(self.now)
        for worker in self.workers.values():
            worker.expected = {name: end for name, end in worker.expected.items() if end > self.now}

    @rule(most=st.sampled_from([1, 100, 10_000]))
    def sweep(self, most: int) -> None:
        self.index.sweep(most)

    # ------------------------------------------------------------ what must hold

    @invariant()
    def every_lookup_says_what_the_sets_say(self) -> None:
        for prompt in PROMPTS:
            match = self.index.match(prompt)
            for row, blocks in enumerate(match.device):
                if row not in self.workers:
                    assert blocks == 0
            for row, worker in self.workers.items():
                usable: set[BlockHash] = set(worker.expected)
                for tier in TIERS:
                    usable |= worker.heard[tier]
                    absent = [depth for depth, name in enumerate(prompt) if name not in usable]
                    assert match.tiers[tier][row] == (absent[0] if absent else len(prompt))

    @invariant()
    def counts_add_up(self) -> None:
        assert self.index.check_integrity() == []
        workers = self.workers.values()
        assert self.index.blocks == sum(len(held) for worker in workers for held in worker.heard.values())
        assert self.index.expected == sum(len(worker.expected) for worker in workers)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
