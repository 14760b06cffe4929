"""The api on a real port, over a backend that exists in memory only and a tokenizer whose tokens are bytes."""

from __future__ import annotations

import asyncio
import codecs
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

import httpx
import msgspec
import openai

from bascule.api.admin import create_admin_app
from bascule.api.app import create_app
from bascule.api.calls import Calls
from bascule.api.context import Context
from bascule.api.server import HttpServer
from bascule.api.tokens import Message, TokenStream
from bascule.clock import WallClock
from bascule.errors import InvalidRequest, NotFound
from bascule.observe.decisions import DecisionRecords
from bascule.observe.metrics import Metrics
from bascule.observe.state import ClusterState, RoutingFigures
from bascule.observe.totals import counts_of
from bascule.router.backend import LinkEnds, LinkReport, ReloadStatus
from bascule.types import (
    CostModel,
    Delta,
    Epoch,
    FinishReason,
    KVLayout,
    ModelCard,
    Placement,
    Request,
    Role,
    Slo,
    TokenLogprobs,
    WorkerId,
    WorkerLoad,
    WorkerStatus,
)

Result = TypeVar("Result")

WAIT = 20.0
"""Seconds after which a test that waits has failed."""

VOCAB = 300
END = 256
CONTEXT = 400
KV_TOKENS = 300

SLO = Slo(ttft_s=2.0, tpot_s=0.06, gap_s=0.2)

LOCAL = Placement(WorkerId("mixed-0"), WorkerId("mixed-0"))
REMOTE = Placement(WorkerId("prefill-0"), WorkerId("decode-0"))

CARD = ModelCard(
    name="tiny",
    fingerprint="00",
    context=CONTEXT,
    vocab=VOCAB,
    layout=KVLayout(dtype="float32", layers=1, kv_heads=1, head_dim=1, block_size=16, planes=2, token_bytes=4),
)

LOAD = WorkerLoad(
    running=1,
    kv_blocks_total=100,
    kv_blocks_leased=30,
    kv_blocks_cached=20,
    kv_blocks_quarantined=1,
    integrity_violations=2,
    handoff_bytes={"shm": 4096},
    handoff_refused={"checksum": 3},
    computed_tokens=48,
    cost_error=0.04,
)


class ByteTokenizer:
    """Token n is byte n; the ids from 256 on are special and have no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if messages[0].role == "assistant":
            raise InvalidRequest("the model's chat template refuses: users speak first", param="messages")
        return self.encode("".join(f"<{message.role}>{message.content}" for message in messages))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if token < END).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < END else b"<end>"

    def stream(self) -> TokenStream:
        return ByteStream()


class ByteStream:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(bytes(token for token in ids if token < END))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class Pause:
    """In a script: nothing more comes until `over` is set, or the generation is cancelled."""

    def __init__(self) -> None:
        self.over = threading.Event()


HOLD = Pause()
"""A pause that only cancelling ends."""

Script = Iterable[Delta | Exception | Pause]


def says(text: str | bytes, *, finish: FinishReason = FinishReason.STOP, size: int = 1) -> list[Delta]:
    """Deltas of `size` tokens that spell `text`; a stop is an end token of its own."""
    raw = text.encode() if isinstance(text, str) else text
    tokens = (*raw, END) if finish is FinishReason.STOP else tuple(raw)
    starts = range(0, len(tokens), size)
    return [
        Delta(tokens=tokens[start : start + size], finish=finish if start + size >= len(tokens) else None)
        for start in starts
    ]


def echoes(request: Request) -> list[Delta]:
    """The default script: the prompt again and again, up to `max_tokens`, with log probabilities where asked for."""
    sampling = request.sampling
    deltas = []
    for position in range(sampling.max_tokens):
        token = request.prompt[position % len(request.prompt)]
        logprobs = None
        if sampling.logprobs is not None:
            top = tuple(((token + rank) % VOCAB, -0.5 - rank) for rank in range(sampling.logprobs))
            logprobs = (TokenLogprobs(-0.5, top),)
        finish = FinishReason.LENGTH if position + 1 == sampling.max_tokens else None
        deltas.append(Delta(tokens=(token,), logprobs=logprobs, finish=finish, cached_tokens=3))
    return deltas


class FakeGeneration:
    """Plays a script; the `Generation` of the fake backend."""

    def __init__(self, script: Script, placement: Placement) -> None:
        self.placement = placement
        self.ended = threading.Event()
        """The script is over, or `cancel` was called before that."""
        self.cancelled = False
        self.finish: FinishReason | None = None
        """What `cancel` was last told."""
        self._script = script

    def cancel(self, finish: FinishReason | None = None) -> None:
        self.finish = self.finish or finish
        if not self.ended.is_set():
            self.cancelled = True
            self.ended.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for step in self._script:
            if isinstance(step, Pause):
                while not (step.over.is_set() or self.ended.is_set()):
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            if self.ended.is_set():
                return
            if isinstance(step, Exception):
                self.ended.set()
                raise step
            if isinstance(step, Delta):
                if step.finish is not None:
                    self.ended.set()
                yield step


class FakeBackend:
    """The `Backend`, and with one worker the `Operations`, in memory.

    `script` makes a request's deltas; `refusal` what `start` raises instead.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.card: ModelCard | None = CARD
        self.ready = True
        self.draining = False
        self.kv_tokens = KV_TOKENS
        self.script: Callable[[Request], Script] = echoes
        self.refusal: Callable[[Request], Exception | None] = lambda request: None
        self.placement = LOCAL
        self.worker = WorkerStatus(
            id=WorkerId("mixed-0"), role=Role.MIXED, state="ready", epoch=Epoch("e1"), pid=7, device="cpu:0", load=LOAD
        )
        self.operations: list[tuple[str, object]] = []
        """What an operator has asked for, and with what."""
        self.reloads = [self.reload_of("running"), self.reload_of("running"), self.reload_of("done", 2)]
        """What is said of a reload, one call after another."""
        self.routing = RoutingFigures()
        self.start_blocked = False
        self.start_cancelled = threading.Event()
        self.requests: list[Request] = []
        self.generations: list[FakeGeneration] = []
        self.started = threading.Event()

    async def start(self, request: Request) -> FakeGeneration:
        self.requests.append(request)
        self.started.set()
        error = self.refusal(request)
        if error is not None:
            raise error
        if self.start_blocked:
            try:
                await asyncio.Event().wait()
            finally:
                self.start_cancelled.set()
        generation = FakeGeneration(self.script(request), self.placement)
        self.generations.append(generation)
        return generation

    @staticmethod
    def reload_of(state: str, done: int = 0, failure: str = "") -> ReloadStatus:
        current = WorkerId("mixed-0" if state == "running" else "")
        waiting = (WorkerId("mixed-1"),) if current else ()
        return ReloadStatus(
            state=state,
            workers=2,
            done=done,
            current=current,
            ended=bool(current),
            waiting=waiting,
            failure=failure,
            fingerprint="f",
        )

    def state(self) -> ClusterState:
        return ClusterState(
            workers=(self.worker,),
            queued=4,
            active=5,
            routing=self.routing,
            kv_faults={"gap": 3},
            totals=counts_of(self.worker.load),
        )

    def drain(self, worker: WorkerId, timeout: float | None = None) -> WorkerStatus:
        self.operations.append(("drain", timeout))
        return self._operated(worker, state="draining", requests=2)

    def resume(self, worker: WorkerId) -> WorkerStatus:
        self.operations.append(("resume", None))
        return self._operated(worker, state="ready", requests=0)

    def set_role(self, worker: WorkerId, role: Role) -> WorkerStatus:
        self.operations.append(("role", role))
        return self._operated(worker, role=role)

    def reload(self, timeout: float | None = None) -> ReloadStatus:
        self.operations.append(("reload", timeout))
        return self.reloads.pop(0)

    def reload_status(self) -> ReloadStatus:
        return self.reloads.pop(0)

    async def measure_link(self, ends: LinkEnds, size: int, runs: int) -> LinkReport:
        self.operations.append(("link", (ends.source, ends.target, ends.transport, size, runs)))
        self._operated(ends.source)
        return LinkReport(
            source=ends.source,
            target=ends.target,
            transport=ends.transport,
            same_machine=True,
            devices=("cpu:0", "cpu:1"),
            bytes=size,
            reserve_s=(0.001,),
            block_s=(0.001,),
            push_s=(0.01,),
            latency_s=0.002,
            bytes_per_s=size / 0.01,
            model=CARD.name,
            fingerprint=CARD.fingerprint,
            context=CARD.context,
            kv_token_bytes=8,
            chunk_tokens=512,
            cost=CostModel(),
        )

    def _operated(self, worker: WorkerId, **changes: Any) -> WorkerStatus:
        if worker != self.worker.id:
            raise NotFound(f"There is no worker {worker!r}; there are: mixed-0.", code="unknown_worker")
        self.worker = msgspec.structs.replace(self.worker, **changes)
        return self.worker


class ApiRig(AbstractContextManager["ApiRig"]):
    """Both servers in a thread with an event loop of its own."""

    def __init__(
        self, *, max_body: int = 1 << 20, api_keys: Sequence[str] = (), admin_keys: Sequence[str] = ()
    ) -> None:
        self._keys = (api_keys, admin_keys)
        self.backend = FakeBackend()
        self.records = DecisionRecords()
        self.metrics = Metrics(self.backend.state, WallClock())
        self.context = Context(
            slo=SLO,
            backend=self.backend,
            tokenizer=ByteTokenizer(),
            clock=WallClock(),
            metrics=self.metrics,
            timeout=60.0,
            max_body=max_body,
        )
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> ApiRig:
        self._thread.start()
        app = create_app(self.context, self._keys[0])
        admin = create_admin_app(self.backend, self.records, self.backend, self._keys[1])
        self.apps = (app, admin)
        self.server = self.call(HttpServer.start(app, self.context.calls, "127.0.0.1", 0))
        self.admin = self.call(HttpServer.start(admin, Calls(), "127.0.0.1", 0))
        self.http = httpx.Client(base_url=self.server.url, timeout=WAIT)
        self.client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, timeout=WAIT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self.client.close()
        self.call(self.server.stop())
        self.call(self.admin.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT)
        self.loop.close()

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the servers' loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; fails if it does not in time."""
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)

    def post(self, path: str, body: object, **options: object) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def complete(self, **fields: object) -> httpx.Response:
        """A completion with defaults for what the test does not care about."""
        return self.post("/v1/completions", {"model": "tiny", "prompt": "abc", **fields})

    def chat(self, **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        return self.post("/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 4, **fields})

    def assert_nothing_runs(self) -> None:
        """Every generation that was started has ended or was cancelled."""
        for generation in self.backend.generations:
            assert generation.ended.wait(WAIT), "a generation still runs after its request"
