"""The words of the house as frozen values: ids, roles, sampling parameters, layouts, what policies read and return."""

from __future__ import annotations

from enum import StrEnum
from typing import NewType

from msgspec import Struct

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
TicketId = NewType("TicketId", str)
Epoch = NewType("Epoch", str)
"""A worker's incarnation: unique for each start of a worker, never used again after it is declared dead."""
BlockHash = NewType("BlockHash", bytes)
"""16 bytes: a keyed hash chained over the prefix, so equal hashes mean equal tokens from position 0 on."""


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Tier(StrEnum):
    """Where a block lives; those below `device` are the KV store."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


class FinishReason(StrEnum):
    """Why an output ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class SamplingParams(Struct, frozen=True, kw_only=True):
    """How the next token is drawn. The whole random state is (seed, position), so any worker draws the same.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `max_tokens` bounds the output.
    `logprobs` None reports none, n >= 0 reports the chosen token's logprob and the n most likely tokens'.
    `stop_token_ids` end the output (reason `stop`); the model's own end tokens do so unless `ignore_eos`.
    No end token is drawn before `min_tokens` tokens are out.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position: of the chosen token, and of the most likely ones, best first.

    They are the model's own distribution (before temperature, penalties and truncation), as OpenAI and vLLM report.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class KVLayout(Struct, frozen=True):
    """How a block's bytes lie in an arena; two workers can hand KV to each other only if theirs are equal.

    An arena is `[planes, blocks, block_size, token_bytes]` in bytes, where a plane is the keys or the values of one
    layer (plane 2*l holds layer l's keys, 2*l+1 its values) and a token's bytes are its `kv_heads * head_dim` numbers.
    """

    dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    planes: int
    token_bytes: int

    @property
    def plane_block_bytes(self) -> int:
        """Bytes of one block in one plane."""
        return self.block_size * self.token_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all planes."""
        return self.planes * self.plane_block_bytes


class ModelCard(Struct, frozen=True, kw_only=True):
    """What a router and a peer must know of a served model. Equal fingerprints mean interchangeable KV."""

    name: str
    fingerprint: str
    """Hex digest over the architecture, weights, dtype and rope settings."""
    context: int
    """Longest prompt plus output, in tokens."""
    vocab: int
    layout: KVLayout


class WorkerLoad(Struct, frozen=True, kw_only=True):
    """A worker's own count of its work and of its books, as of one heartbeat."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_leased: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_quarantined: int = 0
    promised: int = 0
    """Handoff tickets that wait for blocks."""
    integrity_violations: int = 0
    handoff_bytes: dict[str, int] = {}
    """Bytes pushed to peers since the start, by transport."""
    handoff_refused: dict[str, int] = {}
    """Handoffs that this worker refused since the start, by reason."""
    hit_tokens: int = 0
    """Prompt tokens found in the device prefix cache since the start."""


class WorkerView(Struct, frozen=True, kw_only=True):
    """One worker as a policy sees it. `prefilling` and `decoding` are counted by the router at placement time."""

    id: WorkerId
    role: Role
    placeable: bool
    prefilling: int
    """Requests placed here whose first token has not come."""
    decoding: int
    """Requests placed here to be decoded (from placement on)."""
    prefill_tokens: int
    """Prompt tokens of those in `prefilling`."""
    slots: int
    """Most requests it decodes at once."""
    prefill_window: int
    """Prompt tokens that may be in flight to it before further requests wait unbound at the router."""


class Snapshot(Struct, frozen=True):
    """Frozen view of the cluster that a policy reads; `turn` counts the decisions made before this one."""

    workers: tuple[WorkerView, ...]
    turn: int


class RouteQuery(Struct, frozen=True, kw_only=True):
    """What a routing policy knows of a request."""

    request: RequestId
    prompt_tokens: int
    max_tokens: int
    excluded: frozenset[WorkerId] = frozenset()
    """Workers that already failed this request."""


class Placement(Struct, frozen=True):
    """Where a request goes: prefilled and decoded by `prefill` unless `decode` names another worker."""

    prefill: WorkerId
    decode: WorkerId

    @property
    def remote(self) -> bool:
        return self.prefill != self.decode


class Decision(Struct, frozen=True):
    """What a routing policy returns: a placement, or None to wait for capacity, and the reason in a sentence."""

    placement: Placement | None
    reason: str


class Request(Struct, frozen=True, kw_only=True):
    """One prompt to be completed, in token ids; what the api hands to the router."""

    id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    timeout: float
    """Seconds from now until the request ends with an error."""


class Delta(Struct, frozen=True, kw_only=True):
    """The next output tokens of a request, in order, without gap or repeat."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry a token where asked for."""
    finish: FinishReason | None = None
    """Set on the last delta only."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was found and not computed (the same on every delta of a request)."""


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """One worker as an operator sees it."""

    id: WorkerId
    role: Role
    state: str
    """`ready`, or `suspect` while heartbeats are missing; a dead worker is no longer listed."""
    epoch: Epoch
    pid: int
    device: str
    load: WorkerLoad


class ClusterState(Struct, frozen=True, kw_only=True):
    workers: tuple[WorkerStatus, ...]
    queued: int
    """Requests that wait unbound at the router."""
    active: int
    """Requests placed and not ended."""
