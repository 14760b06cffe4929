"""The KV store in virtual time: blocks that outlive their eviction, found again at the price of loading them.

What a worker computes goes into every tier at once and costs nothing there; a prompt waits for what is quicker loaded
than computed, by `policies.load`, and is then as if its worker had it. A full tier forgets what was used longest ago,
and as live nobody tells the router: who looks there in vain does.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from msgspec import Struct

from bascule.engine.sequence import Key
from bascule.policies.load import blocks_to_load, load_seconds
from bascule.sim.agenda import Agenda
from bascule.sim.engine import SimEngine
from bascule.sim.text import Namer
from bascule.types import BlockHash, LinkCost, ModelCard, Tier
from bascule.wire import StorePlace, Submit


class TierPlan(Struct, frozen=True, kw_only=True):
    """A tier of a cluster."""

    tier: Tier
    capacity_bytes: int
    """On each machine, or of the whole cluster where the tier is `remote`."""
    cost: LinkCost
    """What loading from it takes."""


class TierPlace:
    """One tier of one machine, or of all."""

    def __init__(self, plan: TierPlan, name: str, card: ModelCard) -> None:
        self.plan = plan
        self.offer = StorePlace(name, plan.capacity_bytes // card.layout.block_bytes)
        self._blocks: OrderedDict[BlockHash, None] = OrderedDict()

    def put(self, names: Sequence[BlockHash]) -> list[BlockHash]:
        """Take blocks in; returns those that were not there."""
        new = [name for name in names if name not in self._blocks]
        for name in names:
            self._blocks[name] = None
            self._blocks.move_to_end(name)
        while len(self._blocks) > self.offer.blocks:
            self._blocks.popitem(last=False)
        return new

    def has(self, name: BlockHash) -> bool:
        """Whether it is there; then it has been used."""
        if name not in self._blocks:
            return False
        self._blocks.move_to_end(name)
        return True


class Supplied(Struct, frozen=True):
    """What a prompt has got from the store."""

    submission: Submit
    tokens: dict[Tier, int]
    seconds: float


class TierSide:
    """What a worker has to do with the tiers that it has."""

    def __init__(
        self,
        places: Sequence[TierPlace],
        card: ModelCard,
        agenda: Agenda,
        engine: Callable[[], SimEngine],
        tell: Callable[[Tier, Sequence[BlockHash], Sequence[BlockHash]], None],
        ready: Callable[[Supplied], None],
    ) -> None:
        """`tell` reports what came into a tier and what is missing there; `ready` gets each request when it has all
        that it waits for."""
        self.waiting: dict[Key, int] = {}
        """Requests that wait for blocks, and their tokens to be computed."""
        self._places = {place.plan.tier: place for place in places}
        self._costs = {tier: place.plan.cost for tier, place in self._places.items()}
        self._hasher = Namer(card.fingerprint, card.layout.block_size)
        self._size = card.layout.block_size
        self._token_bytes = card.layout.block_bytes // card.layout.block_size
        self._agenda = agenda
        self._engine = engine
        self._tell = tell
        self._ready = ready

    @property
    def offers(self) -> dict[Tier, StorePlace]:
        """For the registration."""
        return {tier: place.offer for tier, place in self._places.items()}

    def computed(self, names: Sequence[BlockHash]) -> None:
        """Blocks have become findable on the device."""
        for tier, place in self._places.items():
            if new := place.put(names):
                self._tell(tier, new, ())

    def cancel(self, key: Key) -> None:
        """It need not be brought any more."""
        self.waiting.pop(key, None)

    def bring(self, submission: Submit) -> None:
        """Load what is quicker loaded than computed, then hand the request on."""
        key = Key(submission.request, submission.attempt)
        tokens = submission.prompt + submission.generated
        names = self._hasher.chain(tokens, submission.salt)[: (len(tokens) - 1) // self._size]
        engine = self._engine()
        here = engine.cached_blocks(names)
        run = self._found(names[here:], expected=submission.stored_tokens // self._size - here)
        blocks = blocks_to_load(
            run,
            self._costs,
            engine.cost,
            prompt_tokens=len(tokens),
            cached_tokens=here * self._size,
            block_tokens=self._size,
            token_bytes=self._token_bytes,
        )
        loaded = {tier: count * self._size for tier, count in Counter(run[:blocks]).items()}
        seconds = load_seconds(self._costs, loaded, self._token_bytes)
        supplied = Supplied(submission, loaded, seconds)
        if not blocks:
            self._ready(supplied)
            return
        self.waiting[key] = len(tokens) - (here + blocks) * self._size
        self._agenda.after(seconds, partial(self._come, key, supplied, names[: here + blocks]))

    def _come(self, key: Key, supplied: Supplied, names: list[BlockHash]) -> None:
        if self.waiting.pop(key, None) is None:
            return
        submission = supplied.submission
        tokens = submission.prompt + submission.generated
        lease = self._engine().borrow(names, tokens, len(names))
        if lease is not None:
            first = lease.cached
            lease.seal(first, names[first:], tokens[first * self._size : len(names) * self._size], submission.salt)
            lease.release()
        self._ready(supplied)

    def _found(self, names: Sequence[BlockHash], expected: int) -> list[Tier]:
        """The fastest tier of each of the leading blocks that some tier has."""
        run: list[Tier] = []
        for name in names:
            tier = next((tier for tier, place in self._places.items() if place.has(name)), None)
            if tier is None:
                break
            run.append(tier)
        missing = names[len(run) : expected]
        if missing:
            for tier in self._places:
                self._tell(tier, (), missing)
        return run
