"""Random histories of the books against a naive model of what each block's memory holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from bascule.kv.books import Books, Lease
from bascule.kv.hashing import BlockHasher
from bascule.types import BlockHash

SIZE = 2
BLOCKS = 7
HASHER = BlockHasher("model", SIZE)
prompts = st.lists(st.integers(0, 1), max_size=4 * SIZE) | st.integers(0, 4).map(lambda blocks: [0] * blocks * SIZE)
PREVIOUS: dict[BlockHash, BlockHash | None] = {}
"""By hash, that of the block before it; None for a first block. Of all prompts that there are."""
for bits in product((0, 1), repeat=4 * SIZE):
    chain = HASHER.chain(bits)
    PREVIOUS.update(zip(chain, [None, *chain], strict=False))


class Held:
    """A lease as the model sees it."""

    def __init__(self, lease: Lease, tokens: list[int]) -> None:
        self.lease = lease
        self.tokens = tokens
        self.blocks = list(lease.blocks)
        self.sealed = False
        """Blocks of its own are findable, or copies of what is."""
        self.swapped = False


class BooksMachine(RuleBasedStateMachine):
    """The model knows who holds what and what lies in each block; where blocks are placed is left to the books."""

    leases = Bundle("leases")
    quarantined = Bundle("quarantined")

    def __init__(self) -> None:
        super().__init__()
        self.books = Books(BLOCKS, SIZE)
        self.held: list[Held] = []
        self.out_of_use: set[int] = set()
        self.content: dict[int, BlockHash | None] = {}
        """What was last written into a block: the KV of a hash, or something else."""
        self.told: set[BlockHash] = set()
        """What a listener thinks is findable, who hears of changes now and then."""
        self.loaded: set[BlockHash] = set()
        """What was ever sealed by one who does not hold what comes before it."""

    def unused(self) -> set[int]:
        """Blocks that nobody holds and that are not quarantined: free or cached."""
        return set(range(BLOCKS)) - self.out_of_use - {block for held in self.held for block in held.blocks}

    def overwrite(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.content[block] = None

    @rule(target=leases, tokens=prompts, fresh=st.integers(0, 2), room=st.integers(0, 3))
    def acquire(self, tokens: list[int], fresh: int, room: int) -> Held | None:
        hashes = HASHER.chain(tokens)
        total = len(hashes) + fresh
        unused = self.unused()
        lease = self.books.acquire(hashes, tokens, total, room)
        if lease is None:
            assert total > len(unused)
            return None
        held = Held(lease, tokens)
        pinned, own = held.blocks[: lease.cached], held.blocks[lease.cached :]
        assert len(held.blocks) == len(set(held.blocks)) == total
        assert [self.content[block] for block in pinned] == hashes[: lease.cached]
        assert set(own) <= unused
        self.overwrite(own)
        self.held.append(held)
        return held

    @rule(held=leases, count=st.integers(1, 3))
    def extend(self, held: Held | None, count: int) -> None:
        if held in self.held:
            unused, before = self.unused(), list(held.blocks)
            grown = held.lease.extend(count)
            assert grown == (count <= len(unused))
            held.blocks = list(held.lease.blocks)
            own = held.blocks[len(before) :]
            assert held.blocks[: len(before)] == before
            assert len(set(own)) == len(own) == (count if grown else 0)
            assert set(own) <= unused
            self.overwrite(own)

    @rule(held=leases)
    def seal(self, held: Held | None) -> None:
        if held in self.held:
            hashes = HASHER.chain(held.tokens)
            start = held.lease.cached
            for block, name in zip(held.blocks[start:], hashes[start:], strict=False):
                self.content[block] = name
            held.lease.seal(start, hashes[start:], held.tokens[start * SIZE : len(hashes) * SIZE])
            held.sealed = held.sealed or start < len(hashes)

    @rule(held=leases, start=st.integers(0, 3), upwards=st.booleans())
    def swap(self, held: Held | None, start: int, upwards: bool) -> None:
        if held not in self.held or held.sealed:
            return
        hashes = HASHER.chain(held.tokens)
        places = range(start, len(hashes))
        places = places if upwards else places[::-1]
        before = list(held.blocks)
        done = held.lease.swap(places, hashes, held.tokens)
        held.blocks = list(held.lease.blocks)
        assert all(self.content[held.blocks[place]] == hashes[place] for place in places[:done])
        assert done == len(places) or not self.books.peek([hashes[places[done]]])
        changed = [place for place, (old, new) in enumerate(zip(before, held.blocks, strict=True)) if old != new]
        assert set(changed) <= set(places[:done])
        held.swapped = held.swapped or bool(changed)
        self.overwrite([before[place] for place in changed])

    @rule(tokens=prompts, start=st.integers(0, 3))
    def load(self, tokens: list[int], start: int) -> None:
        """Of a prompt's end, by one who lets go at once."""
        hashes = HASHER.chain(tokens)[start:]
        if hashes and (lease := self.books.acquire([], [], len(hashes))) is not None:
            self.content.update(zip(lease.blocks, hashes, strict=True))
            lease.seal(0, hashes, tokens[start * SIZE :][: len(hashes) * SIZE])
            lease.release()
            self.loaded.update(hashes)

    @rule(held=leases)
    def release(self, held: Held | None) -> None:
        if held is not None:
            held.lease.release()
            if held in self.held:
                self.held.remove(held)

    @rule(target=quarantined, held=leases)
    def quarantine(self, held: Held | None) -> Held | None:
        if held not in self.held or held.sealed or held.swapped:
            return None
        held.lease.quarantine()
        self.held.remove(held)
        self.out_of_use.update(held.blocks[held.lease.cached :])
        return held

    @rule(held=consumes(quarantined))
    def lift(self, held: Held | None) -> None:
        if held is not None:
            own = held.blocks[held.lease.cached :]
            self.overwrite(own)
            held.lease.lift()
            self.out_of_use.difference_update(own)

    @rule()
    def tell_changes(self) -> None:
        changes = self.books.changes()
        assert self.told.isdisjoint(changes.stored) and self.told.issuperset(changes.removed)
        self.told = (self.told - set(changes.removed)) | set(changes.stored)
        assert self.told == set(self.books._by_hash)

    @rule()
    def tell_all(self) -> None:
        found, changes = self.books.inventory()
        self.told = (self.told - set(changes.removed)) | set(changes.stored)
        assert self.told == set(found)
        assert self.told == set(self.books._by_hash)

    @invariant()
    def books_are_clean_and_agree(self) -> None:
        assert self.books.check_integrity() == []
        counts = self.books.counts
        naming = Counter(block for held in self.held for block in held.blocks)
        assert counts.held == len(naming)
        assert counts.quarantined == len(self.out_of_use)
        assert counts.free + counts.cached == len(self.unused())

    @invariant()
    def what_nobody_holds_has_its_prefix(self) -> None:
        held = {block for held in self.held for block in held.blocks}
        findable = set(self.books._by_hash)
        for name, entry in self.books._by_hash.items():
            assert entry.block in held or PREVIOUS[name] in {None, *findable} or name in self.loaded

    def teardown(self) -> None:
        for held in self.held:
            held.lease.release()
        assert self.books.counts.held == 0
        assert self.books.check_integrity() == []


TestBooksMachine = BooksMachine.TestCase
TestBooksMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
