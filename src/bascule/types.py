"""The words of the house as frozen values: ids, roles, sampling parameters, layouts, what policies read and return."""

from __future__ import annotations

import math
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


PEER = "peer"
"""Beside the tiers, where KV may come from: another worker."""


class Slo(Struct, frozen=True):
    """Bounds on a request's latencies, in seconds; infinity where there is none."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    gap_s: float = math.inf
    """Longest gap between two tokens."""


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


class CostModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a step costs on one class of worker; `policies.cost` says how the terms add up. None is negative."""

    step_s: float = 0.0
    """Seconds that any step takes, however small."""
    token_s: float = 0.0
    """Seconds for each token computed."""
    pair_s: float = 0.0
    """Seconds for each (new token, token it attends to) pair of a prefill part."""
    context_s: float = 0.0
    """Seconds for each token of context that a decoding stream or a prefill part reads."""
    draw_s: float = 0.0
    """Seconds for each stream beside a prefill part, over those for its token: what only drawing a token needs."""
    stream_s: tuple[float, ...] = ()
    """Seconds of a step of 1, 2, 4, 8, ... streams and no prefill, context aside; without, as `step_s` and `token_s`
    have it."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not all(0 <= term < math.inf for term in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"cost model: {name} is {value}; coefficients are finite and not negative")


class LinkCost(Struct, frozen=True):
    """What it takes to hand KV over from one worker to another, as measured."""

    latency_s: float
    bytes_per_s: float


class StepLoad(Struct, frozen=True, array_like=True):
    """What a worker has before it after a step. `received` counts the submissions it has had since it registered, so
    that a router knows which of its own the other figures do not include yet."""

    received: int
    prefilling: int
    """Sequences whose prompt is not computed."""
    backlog_tokens: int
    """Their tokens still to be computed."""
    streams: int
    """Sequences that decode."""
    context_tokens: int
    """Tokens of context of these."""


class StoreLoad(Struct, frozen=True, kw_only=True):
    """One tier of the KV store as a worker sees it. What it holds is all that is there; the rest is this worker's own,
    since its start."""

    blocks: int = 0
    bytes: int = 0
    capacity_bytes: int | None = None
    """None where no bound is known."""
    evictions: int = 0
    errors: dict[str, int] = {}
    """Blocks not read, taken or dropped, by reason."""
    invalid: dict[str, int] = {}
    """Blocks that were read and were not what they should have been, by reason: misses."""
    hit_tokens: int = 0
    """Prompt tokens loaded and not computed."""
    loaded_bytes: int = 0
    saved_bytes: int = 0
    load_s: float = 0.0
    """Seconds spent loading."""
    spared_s: float = 0.0
    """Seconds of computing that this has spared, by the cost model."""
    cost: LinkCost | None = None
    """What loading from it takes."""


class FetchLoad(Struct, frozen=True, kw_only=True):
    """What a worker has fetched from its peers since its start."""

    hit_tokens: int = 0
    """Prompt tokens fetched and not computed."""
    bytes: int = 0
    """Of KV that came, used or not."""
    fetch_s: float = 0.0
    """Seconds spent on it."""
    spared_s: float = 0.0
    """Seconds of computing that this has spared, by the cost model."""
    failed: dict[str, int] = {}
    """Fetches that brought nothing, by reason."""


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
    """Prompt tokens found in the device prefix cache since the start, those from a store or a peer included."""
    stores: dict[Tier, StoreLoad] = {}
    """The tiers below the device that this worker has."""
    fetches: FetchLoad = FetchLoad()
    step: StepLoad | None = None
    cost: CostModel | None = None
    """The worker's cost model as last fitted."""
    cost_error: float | None = None
    """Median of |predicted - measured| / measured over its latest steps."""
    links: dict[WorkerId, LinkCost] = {}
    """To the workers that it has given KV to."""


class CodecCost(Struct, frozen=True, kw_only=True):
    """What a codec does on one class of worker, as measured. Rates are of bytes before they are encoded."""

    name: str
    ratio: float = 1.0
    """Bytes before over bytes after."""
    encode_bytes_per_s: float = math.inf
    decode_bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        for name in self.__struct_fields__[1:]:
            if not getattr(self, name) > 0:
                raise ValueError(f"codec {self.name}: {name} is {getattr(self, name)}; it is more than 0")


class Placement(Struct, frozen=True):
    """Where a request goes: prefilled and decoded by `prefill` unless `decode` names another worker."""

    prefill: WorkerId
    decode: WorkerId

    @property
    def remote(self) -> bool:
        return self.prefill != self.decode

    @property
    def route(self) -> str:
        """As clients and operators read it: `local;decode=ID` or `remote;prefill=ID;decode=ID`."""
        if self.remote:
            return f"remote;prefill={self.prefill};decode={self.decode}"
        return f"local;decode={self.decode}"


class Request(Struct, frozen=True, kw_only=True):
    """One prompt to be completed, in token ids; what the api hands to the router."""

    id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    timeout: float
    """Seconds from now until the request ends with an error."""
    slo: Slo | None = None
    """What this request asks for itself; None for the cluster's."""
    session: str = ""
    """The client's own name for a conversation, if it has one."""
    priority: int = 0
    """Of those that wait, lower ones go first."""
    public_id: str = ""
    """The id of the call as its client knows it, which all its outputs share; empty where it is `id`."""
    output: int = 0
    """Its place among the outputs of that call."""


class Delta(Struct, frozen=True, kw_only=True):
    """The next output tokens of a request, in order, without gap or repeat."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry a token where asked for."""
    finish: FinishReason | None = None
    """Set on the last delta only."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was found and not computed (the same on every delta of a request)."""
    loaded_tokens: dict[str, int] = {}
    """Those of them that came from a `Tier` of the store or a `PEER`."""


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """One worker as an operator sees it."""

    id: WorkerId
    role: Role
    state: str
    """`ready`; `suspect` while heartbeats are missing; `draining` while it takes nothing new and still has requests,
    `drained` once it has none. A dead worker is no longer listed."""
    epoch: Epoch
    pid: int
    device: str
    requests: int = 0
    """Requests that cannot go on without it, as the router knows at once."""
    load: WorkerLoad


class RoutingFigures(Struct, frozen=True, kw_only=True):
    """What the router has decided since it started, and how well it predicted."""

    errors: dict[str, float] = {}
    """Median of |predicted - actual| / actual over the latest completed requests, by term (`ttft`, `tpot`)."""
    decisions: dict[str, int] = {}
    """Placements by kind (`local`, `remote`)."""
    rejected: dict[str, int] = {}
    """Requests answered 429, by reason (`queue`, `slo`)."""
    policy_failures: int = 0
    """Decisions that a plug-in policy failed to make."""
    log_lost: int = 0
    """Requests that could not be written to the decision log."""


class ClusterState(Struct, frozen=True, kw_only=True):
    workers: tuple[WorkerStatus, ...]
    queued: int
    """Requests that wait unbound at the router."""
    active: int
    """Requests placed and not ended."""
    routing: RoutingFigures = RoutingFigures()
    store_handoffs: int = 0
    """Requests that went from one worker to another by way of the KV store."""
    kv_faults: dict[str, int] = {}
    """Reports of workers' KV that were lost (`gap`) or not usable (`overflow`, `malformed`, `stranger`), by kind."""
