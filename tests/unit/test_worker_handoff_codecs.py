"""Handoffs whose blocks are coded on their way: the tokens are those of the coded KV, and nothing is coded unasked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import xxhash
from engine_rig import BLOCK
from handoff_rig import CHUNK, PROMPT, SAMPLING, TARGET, Pair, pair, verdicts
from msgspec import structs

from bascule.engine.mock import MockRunner, mock_card
from bascule.engine.protocol import Slice
from bascule.kv.arena import Arena
from bascule.kv.codecs import codec_named
from bascule.kv.codecs.base import Codec
from bascule.kv.transfer.coding import Coding
from bascule.types import CodecCost, CostModel, KVLayout
from bascule.wire import Commit, PeerMessage, Written

LAYOUT = KVLayout("float32", layers=2, kv_heads=1, head_dim=8, block_size=BLOCK, planes=4, token_bytes=32)
CARD = structs.replace(mock_card(context=256, vocab=1_000_000, block_size=BLOCK), layout=LAYOUT)
LOSSY = ("fp8", "int8", "int4")
FULL, REST = divmod(len(PROMPT), BLOCK)
COSTS = (
    CodecCost(name="none"),
    CodecCost(name="int8", ratio=3.0, encode_bytes_per_s=1e9, decode_bytes_per_s=1e9),
)


class FloatMock(MockRunner):
    """A mock whose KV are numbers: drawn from the KV before it, as the arena has it, and the token."""

    def __init__(self, odd: frozenset[int] = frozenset()) -> None:
        """The KV of tokens in `odd` is infinite in one place."""
        super().__init__(CARD, CostModel(), lambda _: None)
        self._odd = odd

    def _write(self, part: Slice) -> None:
        width = LAYOUT.token_bytes // 4
        rows = self._memory.view(np.float32).reshape(LAYOUT.planes, -1, width)
        for position, token in enumerate(part.tokens, part.start):
            here, before = (
                part.blocks[place // BLOCK] * BLOCK + place % BLOCK for place in (position, max(0, position - 1))
            )
            context = rows[:, before].tobytes() if position else b""
            seed = xxhash.xxh3_64_intdigest(context + token.to_bytes(4, "little"))
            rows[:, here] = np.random.default_rng(seed).standard_normal((LAYOUT.planes, width), np.float32)
            if token in self._odd:
                rows[0, here, 0] = np.inf


def reference(codec: Codec | None) -> list[int]:
    """What a worker draws that has loaded the prompt's full blocks after they have been through `codec`."""
    blocks = list(range(-(-(len(PROMPT) + SAMPLING.max_tokens) // BLOCK)))
    with Arena.create(LAYOUT, len(blocks)) as arena:
        runner = FloatMock()
        runner.bind(arena)
        tokens, computed = list(PROMPT), 0
        while len(tokens) < len(PROMPT) + SAMPLING.max_tokens:
            [sampled] = runner.execute([Slice(tokens[computed:], computed, blocks, SAMPLING, tokens, len(PROMPT))])
            assert sampled is not None
            if computed == 0 and codec is not None:
                codec.decode(codec.encode(arena.bytes[:, :FULL]), arena.bytes[:, :FULL])
            computed = len(tokens)
            tokens.append(sampled.token)
    return tokens[len(PROMPT) :]


def tokens_of(both: Pair) -> list[int]:
    return both.loop.run_until_complete(both.run())


def deliver(both: Pair, message: PeerMessage) -> PeerMessage | None:
    return message


def coded_pair(
    transport: str,
    coding: Coding,
    tamper: Callable[[Pair, PeerMessage], PeerMessage | None] = deliver,
    odd: frozenset[int] = frozenset(),
    allowed: Coding | None = None,
) -> AbstractContextManager[Pair]:
    return pair(transport, tamper, new_runner=lambda: FloatMock(odd), coding=coding, allowed=allowed)


@pytest.mark.parametrize("transport", ["loopback", "tcp"])
@pytest.mark.parametrize("name", LOSSY)
def test_the_tokens_are_those_of_the_coded_kv_and_the_same_each_time(transport: str, name: str) -> None:
    codec = codec_named(name, LAYOUT)
    expected = reference(codec)
    assert expected != reference(None), "the mock must notice what is lost"
    for _ in range(2):
        with coded_pair(transport, Coding.of(name, LAYOUT)) as both:
            assert tokens_of(both) == expected
            assert verdicts(both) == ["accepted"]
            assert both.prefill.bytes_sent[transport] == FULL * codec.record_bytes + LAYOUT.block_bytes
            [link] = both.prefill.links.costs().values()
            assert link.bytes_per_s > 0


def test_shared_memory_is_never_coded() -> None:
    with coded_pair("shm", Coding.of("int8", LAYOUT)) as both:
        assert tokens_of(both) == reference(None)
        assert both.prefill.bytes_sent["shm"] == (FULL + 1) * LAYOUT.block_bytes


@pytest.mark.parametrize("transport", ["loopback", "tcp"])
@pytest.mark.parametrize("moment", [Written, Commit])
def test_a_byte_that_changed_on_the_way_is_refused_and_the_second_round_goes_as_it_is(
    transport: str, moment: type
) -> None:
    spoiled: list[int] = []

    def spoil(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, moment) and not spoiled:
            spoiled.append(both.first_block())
            both.target_arena.bytes[-1, spoiled[0], -1] ^= 1
        return None if moment is Commit and isinstance(message, Written) else message

    with coded_pair(transport, Coding.of("int8", LAYOUT), spoil) as both:
        assert tokens_of(both) == reference(None)
        assert spoiled and verdicts(both) == ["checksum", "accepted"]


@pytest.mark.parametrize("transport", ["loopback", "tcp"])
def test_a_decode_worker_that_does_not_allow_the_codec_gets_the_blocks_as_they_are(transport: str) -> None:
    with coded_pair(transport, Coding.of("int4", LAYOUT), allowed=Coding.of("int8", LAYOUT)) as both:
        assert tokens_of(both) == reference(None)
        assert verdicts(both)[-1] == "accepted"
        [receiver] = both.decode.receivers.values()
        assert receiver.refusals == {"codec not allowed": 1}


def test_what_the_codec_has_no_code_for_goes_as_it_is_beside_what_it_codes() -> None:
    whole = (FULL + 1) * LAYOUT.block_bytes
    with coded_pair("tcp", Coding.of("int8", LAYOUT), odd=frozenset(PROMPT[:2])) as both:
        assert len(tokens_of(both)) == SAMPLING.max_tokens
        assert verdicts(both) == ["accepted"]
        assert CHUNK // BLOCK * LAYOUT.block_bytes < both.prefill.bytes_sent["tcp"] <= whole


@pytest.mark.parametrize(("wire_bytes_per_s", "name"), [(1e7, "int8"), (1e11, None), (None, None)])
def test_auto_codes_for_slow_links_only(wire_bytes_per_s: float | None, name: str | None) -> None:
    codec = codec_named("int8", LAYOUT)
    coding = Coding([codec], COSTS)
    with coded_pair("tcp", coding) as both:
        if wire_bytes_per_s is not None:
            for _ in range(32):
                both.prefill.links.crossed(TARGET.worker, "tcp", 1 << 20, (1 << 20) / wire_bytes_per_s)
        assert tokens_of(both) == reference(codec if name else None)
        size = codec.record_bytes if name else LAYOUT.block_bytes
        assert both.prefill.bytes_sent["tcp"] == FULL * size + LAYOUT.block_bytes


def test_the_prompt_of_these_tests_ends_within_a_block_and_has_several_chunks() -> None:
    assert REST and len(PROMPT) > 2 * CHUNK
