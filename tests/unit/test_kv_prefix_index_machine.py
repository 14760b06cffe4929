"""Random histories of workers, channels that lose messages, and the index, against sets that say the same naively."""

from __future__ import annotations

from collections import Counter
from itertools import product

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bascule.kv.hashing import BlockHasher
from bascule.kv.prefix_index import PrefixIndex
from bascule.router.kv_feed import ASK_AGAIN_S, KvFeed
from bascule.types import BlockHash, Epoch, Tier, WorkerId
from bascule.wire import KvEvents, TierChanges

LIFETIME = 5.0
ROWS = ((0, 1, 2), (0, 1, 20))
"""Of few rows lookups count one by one, of many all at once."""
TIERS = (Tier.DEVICE, Tier.HOST)
HASHER = BlockHasher("model", 1)
PROMPTS = [HASHER.chain(tokens) for tokens in product((0, 1), repeat=3)]
NAMES = sorted({name for prompt in PROMPTS for name in prompt})
CAPACITY = {Tier.DEVICE: 6, Tier.HOST: 3}

numbers = st.integers(0, 2)
names = st.lists(st.sampled_from(NAMES), unique=True, max_size=6)
prompts = st.sampled_from(PROMPTS)
Sets = dict[Tier, set[BlockHash]]


def nothing() -> Sets:
    return {tier: set() for tier in TIERS}


class Worker:
    """What a worker has, what it has sent, and what a listener of perfect memory would make of what arrived."""

    def __init__(self) -> None:
        self.truth = nothing()
        self.heard = nothing()
        self.expected: dict[BlockHash, float] = {}
        self.sequence = 0
        self.channel: list[KvEvents] = []

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
            self.heard[tier] -= gone
            if tier is not Tier.DEVICE and len(come) > CAPACITY[tier] - len(self.heard[tier]):
                continue  # removals were lost: a tier that seems crowded is left as it is until all is told anew
            self.heard[tier] |= come
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

    def pick(self, number: int) -> tuple[int, Worker, KvFeed]:
        row = sorted(self.workers)[number % len(self.workers)]
        return row, self.workers[row], self.feeds[row]

    # ------------------------------------------------------------ workers

    @initialize(rows=st.sampled_from(ROWS))
    def all_join(self, rows: tuple[int, ...]) -> None:
        self.rows = rows
        for _ in rows:
            self.join()

    @precondition(lambda self: len(self.workers) < len(self.rows))
    @rule()
    def join(self) -> None:
        row = min(set(self.rows) - set(self.workers))
        self.index.join(row, CAPACITY)
        self.workers[row] = Worker()
        self.feeds[row] = KvFeed(self.index, row, Counter())

    @precondition(lambda self: len(self.workers) > 1)
    @rule(number=numbers)
    def leave(self, number: int) -> None:
        row, _worker, _feed = self.pick(number)
        self.index.leave(row)
        del self.workers[row], self.feeds[row]

    # ------------------------------------------------------------ what workers do

    @rule(number=numbers, tier=st.sampled_from(TIERS), stored=names, removed=names, arrives=st.booleans())
    def change(self, number: int, tier: Tier, stored: list[BlockHash], removed: list[BlockHash], arrives: bool) -> None:
        _row, worker, _feed = self.pick(number)
        gone = worker.truth[tier] & set(removed)
        left = worker.truth[tier] - gone
        room = CAPACITY[tier] - len(left)
        come = [name for name in stored if name not in worker.truth[tier]][:room]
        worker.truth[tier] = left | set(come)
        worker.send(TierChanges(tier, b"".join(come), b"".join(gone)))
        if arrives:
            self.deliver(number)

    @rule(number=numbers, name=st.sampled_from(NAMES))
    def move_to_host(self, number: int, name: BlockHash) -> None:
        _row, worker, _feed = self.pick(number)
        if name in worker.truth[Tier.DEVICE] and len(worker.truth[Tier.HOST]) < CAPACITY[Tier.HOST]:
            worker.truth[Tier.DEVICE].remove(name)
            worker.truth[Tier.HOST].add(name)
            worker.send(TierChanges(Tier.DEVICE, b"", name), TierChanges(Tier.HOST, name, b""))

    # ------------------------------------------------------------ what arrives

    @rule(number=numbers)
    def lose(self, number: int) -> None:
        _row, worker, _feed = self.pick(number)
        del worker.channel[:1]

    @rule(number=numbers)
    def deliver(self, number: int) -> None:
        _row, worker, feed = self.pick(number)
        for message in worker.channel:
            feed.apply(message)
            worker.hear(message)
        worker.channel.clear()

    @rule(number=numbers)
    def catch_up(self, number: int) -> None:
        """Once everything sent has come or been missed, and the worker asked if need be, the index is true."""
        _row, worker, feed = self.pick(number)
        self.deliver(number)
        feed.told(worker.sequence)
        self.now += ASK_AGAIN_S
        if feed.should_ask(self.now):
            worker.send_all()
            self.deliver(number)
        assert feed.in_step
        assert worker.heard == worker.truth

    # ------------------------------------------------------------ what the router does

    @rule(number=numbers, prompt=prompts)
    def expect(self, number: int, prompt: list[BlockHash]) -> None:
        row, worker, _feed = self.pick(number)
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
