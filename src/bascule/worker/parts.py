"""What a worker is, and what it is made of before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from bascule.engine.core import Engine
from bascule.engine.protocol import Runner
from bascule.kv.arena import Arena
from bascule.kv.books import Books
from bascule.kv.hashing import BlockHasher
from bascule.kv.store.tiers import Tiers
from bascule.kv.transfer.coding import Coding
from bascule.policies.snapshot import CHUNK_TOKENS
from bascule.types import CostModel, Epoch, Role, WorkerId


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a worker is to the others."""

    worker: WorkerId
    epoch: Epoch
    role: Role
    device: str


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a worker is made of, built before it starts."""

    runner: Runner
    arena: Arena
    books: Books
    hasher: BlockHasher
    engine: Engine
    max_sequences: int
    chunk_tokens: int = CHUNK_TOKENS
    cost: CostModel
    """What a step is expected to cost."""
    tiers: Tiers | None = None
    """Where KV is kept below the arena, if anywhere."""
    coding: Coding = field(default_factory=Coding)
    """How blocks may go to other workers over a link."""
