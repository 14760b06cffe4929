"""The words of the house as frozen values: ids, roles, sampling parameters, layouts, what policies read and return."""

from __future__ import annotations

import math
from collections import Counter
from enum import StrEnum
from typing import Annotated, NewType

from msgspec import Meta, Struct

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
TicketId = NewType("TicketId", str)
Epoch = NewType("Epoch", str)
"""A worker's incarnation: unique for each start of a worker, never used again after it is declared dead."""
BlockHash = NewType("BlockHash", bytes)
"""16 bytes: a keyed hash chained over the prefix, so equal hashes mean equal tokens from position 0 on."""

SALT_BYTES = 32
Salt = Annotated[bytes, Meta(max_length=SALT_BYTES)]
"""What keeps a tenant's blocks apart from all others' (`kv.hashing.salt_of`): 32 bytes, none for what all may share."""


def check_salt(salt: Salt) -> None:
    """Raises ValueError for another length: half as many bytes would be taken for a block's hash."""
    if len(salt) not in (0, SALT_BYTES):
        raise ValueError(f"a salt has {SALT_BYTES} bytes or none, not {len(salt)}")


Count = Annotated[int, Meta(ge=0, le=2**53)]
"""How many; a message with any other number is refused when it is decoded, as with all that follow."""
Size = Annotated[int, Meta(ge=1, le=2**31)]
"""Of a model, or of a worker's memory: products of two have room in 64 bits."""
Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Figure = Annotated[float, Meta(ge=-1e15, le=1e15)]
"""A sum of measurements: finite."""


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


Bound = Annotated[float, Meta(gt=0)]


class Slo(Struct, frozen=True):
    """Bounds on a request's latencies, in seconds; infinity where there is none."""

    ttft_s: Bound = math.inf
    tpot_s: Bound = math.inf
    gap_s: Bound = math.inf
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

    max_tokens: Count
    temperature: Annotated[float, Meta(ge=0, le=1e6)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.0
    seed: Annotated[int, Meta(ge=0)] = 0
    min_tokens: Count = 0
    stop_token_ids: tuple[Token, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=1000)] | None = None
    logit_bias: tuple[tuple[Token, Annotated[float, Meta(ge=-1e6, le=1e6)]], ...] = ()


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position: of the chosen token, and of the most likely ones, best first.

    They are the model's own distribution (before temperature, penalties and truncation), as OpenAI and vLLM report.
    """

    logprob: float
    top: tuple[tuple[Token, float], ...] = ()


class KVLayout(Struct, frozen=True):
    """How a block's bytes lie in an arena; two workers can hand KV to each other only if theirs are equal.

    An arena is `[planes, blocks, block_size, token_bytes]` in bytes, where a plane is the keys or the values of one
    layer (plane 2*l holds layer l's keys, 2*l+1 its values) and a token's bytes are its `kv_heads * head_dim` numbers.
    """

    dtype: str
    layers: Size
    kv_heads: Size
    head_dim: Size
    block_size: Size
    planes: Size
    token_bytes: Size

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
    context: Size
    """Longest prompt plus output, in tokens."""
    vocab: Size
    layout: KVLayout
    tokenizer: str = ""
    """Digest of the vocabulary; empty if it is not known."""


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
            if not all(0 <= term <= 1e9 for term in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"cost model: {name} is {value}; coefficients are not negative, and at most 1e9 s")


class LinkCost(Struct, frozen=True):
    """What it takes to hand KV over from one worker to another, as measured."""

    latency_s: Seconds
    bytes_per_s: Annotated[float, Meta(gt=0)]


class StepLoad(Struct, frozen=True, array_like=True):
    """What a worker has before it after a step. `received` counts the submissions it has had since it registered, so
    that a router knows which of its own the other figures do not include yet."""

    received: Count
    prefilling: Count
    """Sequences whose prompt is not computed."""
    backlog_tokens: Count
    """Their tokens still to be computed."""
    streams: Count
    """Sequences that decode."""
    context_tokens: Count
    """Tokens of context of these."""
    slack_s: float | None = None
    """What prompts may take from these at once, beyond what just keeps their TPOT; None where nothing bounds them."""


class StoreLoad(Struct, frozen=True, kw_only=True):
    """One tier of the KV store as a worker sees it. What it holds is all that is there; the rest is this worker's own,
    since its start."""

    blocks: Count = 0
    bytes: Count = 0
    capacity_bytes: Count | None = None
    """None where no bound is known."""
    evictions: Count = 0
    """In the `remote` tier those of all its users, as each of them sees them since its own start."""
    errors: dict[str, Count] = {}
    """Blocks not read, taken or dropped, by reason."""
    invalid: dict[str, Count] = {}
    """Blocks that were read and were not what they should have been, by reason: misses."""
    hit_tokens: Count = 0
    """Prompt tokens loaded and not computed."""
    loaded_bytes: Count = 0
    saved_bytes: Count = 0
    load_s: Figure = 0.0
    """Seconds spent loading."""
    spared_s: Figure = 0.0
    """Seconds of computing that this has spared, by the cost model."""
    cost: LinkCost | None = None
    """What loading from it takes."""


class FetchLoad(Struct, frozen=True, kw_only=True):
    """What a worker has fetched from its peers since its start."""

    hit_tokens: Count = 0
    """Prompt tokens fetched and not computed."""
    bytes: Count = 0
    """Of KV that came, used or not."""
    fetch_s: Figure = 0.0
    """Seconds spent on it."""
    spared_s: Figure = 0.0
    """Seconds of computing that this has spared, by the cost model."""
    failed: dict[str, Count] = {}
    """Fetches that brought nothing, by reason."""


class Brought(Struct, frozen=True):
    """KV of one request's prompt that came from the KV store or from a peer; counts by `Tier`, or `PEER`."""

    tokens: dict[str, Count] = {}
    """Of the prompt, found there and not computed."""
    seconds: Figure = 0.0
    """That the request waited for it before the engine had it. What is loaded beside computing adds nothing."""
    bytes: dict[str, Count] = {}
    """Moved for it by then, as they were stored or sent, used or not."""
    spared_s: Figure = 0.0
    """Seconds of computing that this has spared, by the cost model."""

    def __add__(self, other: Brought) -> Brought:
        return Brought(
            dict(Counter(self.tokens) + Counter(other.tokens)),
            self.seconds + other.seconds,
            dict(Counter(self.bytes) + Counter(other.bytes)),
            self.spared_s + other.spared_s,
        )


class StoreHandoff(Struct, frozen=True):
    """What handing a request over by way of the KV store moved, by tier: `saved` by the prefill worker, which writes
    nothing that lies there already, `loaded` by the decode worker."""

    saved_bytes: dict[str, int] = {}
    loaded_tokens: dict[str, int] = {}
    """Of the prompt."""
    loaded_bytes: dict[str, int] = {}
    load_s: float = 0.0
    """That the request waited for what was loaded."""
    computed_tokens: int = 0
    """Of the prompt, that the decode worker found nowhere and computed a second time."""


class WorkerLoad(Struct, frozen=True, kw_only=True):
    """A worker's own count of its work and of its books, as of one heartbeat."""

    running: Count = 0
    waiting: Count = 0
    kv_blocks_total: Count = 0
    kv_blocks_leased: Count = 0
    kv_blocks_cached: Count = 0
    kv_blocks_quarantined: Count = 0
    promised: Count = 0
    """Handoff tickets that wait for blocks."""
    integrity_violations: Count = 0
    handoff_bytes: dict[str, Count] = {}
    """Bytes pushed to peers since the start, by transport."""
    handoff_refused: dict[str, Count] = {}
    """Handoffs that this worker refused since the start, by reason."""
    hit_tokens: Count = 0
    """Prompt tokens found in the device prefix cache since the start, those from a store or a peer included."""
    computed_tokens: Count = 0
    """Prompt tokens that its steps have computed since the start, each time that they did."""
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
    unreachable: dict[WorkerId, str] = {}
    """Workers that it cannot connect to: the address, and why."""


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
    salt: Salt = b""
    """KV of its tokens is found by requests of this salt alone."""


class Delta(Struct, frozen=True, kw_only=True):
    """The next output tokens of a request, in order, without gap or repeat."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry a token where asked for."""
    finish: FinishReason | None = None
    """Set on the last delta only."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was found and not computed (the same on every delta of a request)."""
    brought: Brought = Brought()
    """What of it came from the KV store or from a peer (the same, too)."""
    handoff: StoreHandoff | None = None
    """What has been handed over by way of the KV store by then, if that was the way."""


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """One worker as an operator sees it."""

    id: WorkerId
    role: Role
    state: str
    """`ready`; `suspect` while heartbeats are missing or it is left alone; `draining` while it takes nothing new and
    still has requests, `drained` once it has none. A dead worker is no longer listed."""
    epoch: Epoch
    pid: int
    device: str
    requests: int = 0
    """Requests that cannot go on without it, as the router knows at once."""
    clock_skew_s: float | None = None
    """How far its time of day is behind the router's (ahead where negative); None while unknown."""
    load: WorkerLoad
