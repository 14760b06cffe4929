"""What the api knows of everything below it: a place that turns requests into streams of tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from msgspec import Struct, field

from bascule.observe.state import ClusterState
from bascule.types import (
    CostModel,
    Delta,
    FinishReason,
    ModelCard,
    Placement,
    Request,
    Role,
    WorkerId,
    WorkerStatus,
)


class Generation(Protocol):
    """A request under way. Iterating yields its deltas, the last one with `finish`; failures raise RequestError."""

    @property
    def placement(self) -> Placement:
        """Where the request was placed."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self, finish: FinishReason | None = None) -> None:
        """Stop it everywhere by the next step boundary. Idempotent; does nothing once it has ended.

        `finish` says how it ended where its reader found the end in what it had (a stop string).
        """
        ...


class Backend(Protocol):
    @property
    def card(self) -> ModelCard | None:
        """The model served; None until the first worker has registered."""
        ...

    @property
    def ready(self) -> bool:
        """True while a request could be placed."""
        ...

    @property
    def draining(self) -> bool:
        """True while none can be placed, but those that come wait: every worker that could take them is drained, or is
        being started again."""
        ...

    @property
    def kv_tokens(self) -> int:
        """The longest prompt plus output that every worker's KV memory can hold, in tokens."""
        ...

    async def start(self, request: Request) -> Generation:
        """Admit and place a request; returns once it is placed and its first delta is ready.

        Raises RequestError (Overloaded, Unavailable, DeadlineExceeded, WorkerFailure, InvalidRequest).
        """
        ...

    def state(self) -> ClusterState: ...


class LinkEnds(Struct, frozen=True):
    """One way of handing KV over."""

    source: WorkerId = field(name="from")
    target: WorkerId = field(name="to")
    transport: str


class LinkReport(Struct, frozen=True, kw_only=True):
    """What a link was measured to take, and what says what that means for requests."""

    source: WorkerId = field(name="from")
    target: WorkerId = field(name="to")
    transport: str
    same_machine: bool
    devices: tuple[str, str]
    """Of both workers."""
    bytes: int
    """Of one push."""
    reserve_s: tuple[float, ...]
    """Seconds of each reservation of blocks: two messages between the workers."""
    block_s: tuple[float, ...]
    """Of each push of one block."""
    push_s: tuple[float, ...]
    """Of each push of all blocks, checksums taken."""
    latency_s: float
    """What a handoff takes beside its bytes: two messages and the beginning of a push, medians."""
    bytes_per_s: float
    model: str
    fingerprint: str
    context: int
    kv_token_bytes: int
    chunk_tokens: int
    """Most prompt tokens that the first worker computes in a step."""
    cost: CostModel
    """Of the first worker's steps."""


class ReloadStatus(Struct, frozen=True, kw_only=True):
    """How far it is that all workers are started anew, one after another."""

    state: str
    """`none`, `running`, `done` or `failed`."""
    workers: int
    """That were there at the beginning."""
    done: int
    """Of them, those that have ended and been replaced."""
    current: WorkerId
    """The one that is being replaced; empty if none is."""
    ended: bool
    """It has ended, and is yet to be started again."""
    waiting: tuple[WorkerId, ...]
    """Workers that have come with other weights, which are not served yet."""
    failure: str
    """Why it has stopped, and what to do."""
    fingerprint: str
    """Of the weights that new requests get."""


class Operations(Protocol):
    """What an operator does to single workers, to the links between them, and to all workers.

    All raise NotFound for an id that is not there, naming those that are; those that change a worker return it as it
    is then.
    """

    def drain(self, worker: WorkerId, timeout: float | None = None) -> WorkerStatus:
        """Place nothing more on it. What it has ends there, or after `timeout` seconds goes on where else it can."""
        ...

    def resume(self, worker: WorkerId) -> WorkerStatus:
        """Place on it again; raises Conflict for a worker that is about to end."""
        ...

    def set_role(self, worker: WorkerId, role: Role) -> WorkerStatus:
        """Use it for that from the next placement on; raises Conflict where it has no role, or is needed in its own."""
        ...

    async def measure_link(self, ends: LinkEnds, size: int, runs: int) -> LinkReport:
        """Push about `size` bytes from one worker to another `runs` times, which takes seconds; one at a time.

        Raises Conflict (code `busy` where it may work later, else with what is in the way), or WorkerFailure.
        """
        ...

    def reload(self, timeout: float | None = None) -> ReloadStatus:
        """Have all workers end and start anew, one after another; each has `timeout` seconds to come back.

        Raises Conflict where that is under way, or where there is no worker.
        """
        ...

    def reload_status(self) -> ReloadStatus:
        """Of the latest one."""
        ...
