"""A busy cluster for decisions to be measured on: workers with work on them, and blocks that some of them share."""

from __future__ import annotations

from itertools import cycle

import numpy as np

from bascule.kv.hashing import HASH_BYTES, BlockHasher
from bascule.kv.prefix_index import PrefixIndex
from bascule.router.view import ClusterView
from bascule.types import CostModel, Epoch, KVLayout, ModelCard, Placement, Role, StepLoad, Tier, WorkerId
from bascule.wire import VERSION, PeerAddress, Register

BLOCK_TOKENS = 16
CARD = ModelCard(
    name="bench",
    fingerprint="b3" * 16,
    context=131_072,
    vocab=128_000,
    layout=KVLayout("bfloat16", 32, 8, 128, BLOCK_TOKENS, 64, 2048),
)
COST = CostModel(
    step_s=0.006, token_s=4e-5, pair_s=1e-9, context_s=2e-8, stream_s=(0.005, 0.0052, 0.0055, 0.006, 0.007)
)
"""About an 8B model on a data-centre GPU."""
_SHARED_PROMPTS = 0.3
"""Share of prompts that begin like others."""
_STEMS = 32
"""Prompts that others begin like; each is held by up to half of the workers."""
_BRANCHES = 0.3
"""Share of what is cached that branches off a stem."""


def busy_view(workers: int, seed: int) -> ClusterView:
    """Workers of all roles, three in five of them mixed, with between none and 24 streams and two prompts each."""
    rng = np.random.default_rng(seed)
    view = ClusterView()
    roles = cycle([Role.MIXED, Role.PREFILL, Role.MIXED, Role.DECODE, Role.MIXED])
    for number, role in zip(range(workers), roles, strict=False):
        member = view.add(_offer(number, role), 0.0)
        placement = Placement(member.id, member.id)
        prompts, streams = int(rng.integers(3)), int(rng.integers(25))
        for _ in range(prompts):
            view.place(placement, int(rng.integers(50, 2000)), 2000, 0.0)
        for _ in range(streams):
            tokens = int(rng.integers(100, 4000))
            view.place(placement, 1, tokens, 0.0)
            view.prefilled(placement, 1)
        sent = prompts + streams
        view.stepped(member, StepLoad(sent, prompts, int(rng.integers(1000)), streams, 2000 * streams), 0.0)
    return view


def _offer(number: int, role: Role) -> Register:
    name = WorkerId(f"worker-{number}")
    return Register(
        version=VERSION,
        worker=name,
        epoch=Epoch(f"{name}-1"),
        role=role,
        card=CARD,
        device="none",
        pid=number,
        peer=PeerAddress(name, Epoch(f"{name}-1"), ""),
        max_sequences=64,
        kv_blocks=20_000,
        machine=f"machine-{number // 8}",
        lends=True,
        cost=COST,
    )


class HeldBlocks:
    """What a cluster has cached: some prompts that many workers hold, others that branch off them, and others still."""

    def __init__(self, seed: int, prompt_blocks: int) -> None:
        self.blocks = 0
        """Different ones that workers hold."""
        self._rng = np.random.default_rng(seed)
        self._tokens = prompt_blocks * BLOCK_TOKENS
        hasher = BlockHasher(CARD.fingerprint, BLOCK_TOKENS)
        self._stems = [self._random_tokens(self._tokens) for _ in range(_STEMS)]
        self._names = [b"".join(hasher.chain(stem)) for stem in self._stems]

    def fill(self, index: PrefixIndex, workers: int, blocks: int) -> None:
        """Let workers join the index on the rows from 0 on, and hold `blocks` different blocks together."""
        for row in range(workers):
            index.join(row, {Tier.DEVICE: 4 * blocks})
        whole = self._tokens // BLOCK_TOKENS
        for name in self._names[: max(blocks // whole, 1)]:
            for row in self._rng.choice(workers, max(int(workers * self._rng.uniform(0.01, 0.5)), 1), replace=False):
                depth = int(self._rng.integers(1, whole + 1))
                index.store(int(row), Tier.DEVICE, name[: depth * HASH_BYTES])
            index.store(0, Tier.DEVICE, name)
            self.blocks += whole
        for row in cycle(range(workers)):
            if self.blocks >= blocks:
                break
            shared = int(self._rng.integers(whole)) if self._rng.random() < _BRANCHES else 0
            stem = self._names[int(self._rng.integers(_STEMS))][: shared * HASH_BYTES]
            own = min(whole - shared, blocks - self.blocks)
            index.store(row, Tier.DEVICE, stem + self.random_blocks(own))
            self.blocks += own

    def random_blocks(self, count: int) -> bytes:
        """The hashes of blocks that nobody has."""
        return self._rng.bytes(count * HASH_BYTES)

    def prompts(self, count: int) -> list[tuple[int, ...]]:
        """Prompts to decide on, as token ids; some begin like what is held, to any depth."""
        prompts = []
        for _ in range(count):
            depth = int(self._rng.integers(1, self._tokens)) if self._rng.random() < _SHARED_PROMPTS else 0
            stem = self._stems[int(self._rng.integers(_STEMS))][:depth]
            prompts.append((*stem, *self._random_tokens(self._tokens - depth)))
        return prompts

    def _random_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.integers(CARD.vocab, size=count).tolist())
