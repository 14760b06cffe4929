"""KV of one salt is never found under another, wherever it lies and however it moves; under its own it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from random import Random

import pytest
from engine_rig import BLOCK, CARD, Rig, bring, reference, work
from fetch_rig import Two, play
from handoff_rig import PROMPT, SAMPLING, Pair, pair, verdicts
from msgspec import structs
from store_side_rig import HASHER, KNOWN, Node, prompt_of
from store_side_rig import run as run_scenario
from test_worker_preempted import BLOCKS, served, two_that_do_not_fit

from bascule.kv.hashing import BlockHasher, salt_of
from bascule.kv.store.forms import Forms
from bascule.kv.store.memory import MemoryStore
from bascule.kv.store.record import inspect, tenant_digest
from bascule.kv.store.tiers import Tiers
from bascule.peer_wire import PeerMessage, Prepare, Reserved
from bascule.types import BlockHash, Tier

SALTS = [b"", salt_of("ann"), salt_of("ben")]
ANN, BEN = SALTS[1:]
FULL = len(PROMPT) // BLOCK
OURS = BlockHasher(CARD.fingerprint, BLOCK)
"""As the two sides of a handoff have it."""
FORMS = Forms("none", CARD.layout)


def cached(rig: Rig, name: str, salt: bytes) -> int:
    """Serve the prompt under this salt, check its tokens, and tell how many of the prompt's were cached."""
    rig.engine.submit(work(name, PROMPT, SAMPLING, salt=salt))
    rig.run()
    [outputs] = [outputs for key, outputs in rig.outputs.items() if key.request == name]
    assert [each.token for each in outputs] == reference(PROMPT, SAMPLING)
    return outputs[0].cached_tokens


def test_an_engine_finds_what_was_computed_under_the_same_salt_alone() -> None:
    rig = Rig(blocks=100)
    for turn, salt in product(range(3), SALTS):
        assert cached(rig, f"{turn} {salt.hex()}", salt) == (FULL * BLOCK if turn else 0)
    rig.assert_idle()


def test_blocks_that_appear_while_a_prompt_is_computed_are_anothers_too() -> None:
    """They are looked for before each step."""
    rig = Rig(chunk=BLOCK)
    rig.engine.submit(work("r", PROMPT, SAMPLING, salt=ANN))
    rig.step()
    assert bring(rig, PROMPT, range(FULL))
    rig.run()
    [outputs] = rig.outputs.values()
    assert [each.token for each in outputs] == reference(PROMPT, SAMPLING)
    assert outputs[0].cached_tokens == 0


def test_a_tier_gives_each_salt_its_own_blocks_and_says_whose_they_are() -> None:
    store, prompt = MemoryStore(1 << 24), prompt_of(1)

    async def scenario() -> None:
        with ExitStack() as stack:
            for turn, salt in product(range(2), SALTS):
                brought = await Node([store], stack).complete(prompt, salt=salt)
                assert (brought is None) == (turn == 0), "the first of its salt computes, the second loads"
            for salt in SALTS:
                names = HASHER.chain(prompt, salt)
                assert {inspect(name, store._blocks[name]).tenant for name in names} == {tenant_digest(salt)}

    run_scenario(scenario)


@pytest.mark.timeout(60)
def test_a_preempted_sequence_gets_back_what_is_of_its_own_salt() -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            store = MemoryStore(1 << 24)
            for salt in (b"", BEN):  # all of it lies there for others
                others = [structs.replace(each, salt=salt) for each in two_that_do_not_fit()]
                await served(Node([store], stack, blocks=4 * BLOCKS), others)
            asked = [structs.replace(each, salt=ANN) for each in two_that_do_not_fit()]
            node = Node([store], stack, blocks=BLOCKS, chunk=2 * BLOCK, step=16 + 2 * BLOCK)
            node.rig.engine.cost = KNOWN
            assert await served(node, asked) > 0
            assert node.tiers.figures[Tier.HOST].loaded_blocks > 0
            for each, salt in product(asked, (b"", BEN)):
                assert (
                    node.rig.books.count_cached(
                        HASHER.chain([*each.prompt, *reference(each.prompt, each.sampling)], salt)
                    )
                    == 0
                )

    run_scenario(scenario)


def test_a_peer_gives_what_was_computed_under_the_salt_asked_for() -> None:
    prompt = [*prompt_of(1), 7]

    async def scenario(two: Two) -> None:
        two.compute(1, prompt, ANN)
        for salt in (b"", BEN):
            assert await two.fetch(prompt, len(prompt), salt) == 0
            assert two.compute(0, prompt, salt) == 0
        assert await two.fetch(prompt, len(prompt), ANN) == 10
        assert two.compute(0, prompt, ANN) == 10 * BLOCK

    play(scenario)


def test_a_peer_loads_from_its_store_what_is_of_the_salt_asked_for() -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            store, prompt = MemoryStore(1 << 24), prompt_of(1)
            await Node([store], stack).complete(prompt, salt=ANN)
            lender = Node([store], stack)
            for salt in SALTS:
                await lender.side.bring(prompt, salt)
                found = lender.rig.books.count_cached(HASHER.chain(prompt, salt))
                assert found == (10 if salt == ANN else 0)

    run_scenario(scenario)


def test_what_was_loaded_or_fetched_goes_on_to_the_next_tier_as_its_tenants() -> None:
    async def scenario() -> None:
        with ExitStack() as stack:
            first, second = MemoryStore(1 << 24), MemoryStore(1 << 24)
            await Node([first], stack).complete(prompt_of(1), salt=ANN)
            both = Node([first], stack)
            assert await both.complete(prompt_of(1), salt=ANN) is not None
            names = HASHER.chain(prompt_of(1), ANN)
            tiers = Tiers([second], both.rig.arena, both.rig.books, both.rig.runner.card.fingerprint, FORMS)
            assert set(tiers.save(Tier.HOST, names).taken) == set(names)
            assert {inspect(name, second._blocks[name]).tenant for name in names} == {tenant_digest(ANN)}

    run_scenario(scenario)


@pytest.mark.parametrize("salt", SALTS[:2])
def test_a_handoff_keeps_its_salt_on_both_sides(salt: bytes) -> None:
    with pair("loopback") as both:
        assert both.loop.run_until_complete(both.run(salt)) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["accepted"]
        for engine in (both.source, both.target):
            assert [engine._books.count_cached(OURS.chain(PROMPT, each)) for each in SALTS] == [
                FULL if each == salt else 0 for each in SALTS
            ]


@pytest.mark.parametrize(("known", "blocks"), [(b"", 0), (BEN, 0), (ANN, FULL)])
def test_a_reservation_keeps_what_is_here_of_its_own_salt(known: bytes, blocks: int) -> None:
    with pair("loopback") as both:
        both.target.submit(work("before", PROMPT, SAMPLING, salt=known))
        while both.target.has_work():
            both.target.step()
        assert both.loop.run_until_complete(both.run(ANN)) == reference(PROMPT, SAMPLING)
        [reserved] = [message for message in both.to_prefill if isinstance(message, Reserved)]
        assert reserved.have_blocks == blocks
        assert verdicts(both) == ["accepted"]


def test_sides_of_a_handoff_that_take_it_for_different_tenants_do_not_hand_over() -> None:
    def alter(_: Pair, message: PeerMessage) -> PeerMessage:
        return structs.replace(message, salt=BEN) if isinstance(message, Prepare) else message

    with pair("loopback", alter) as both:
        assert both.loop.run_until_complete(both.run(ANN)) == reference(PROMPT, SAMPLING)
        assert set(verdicts(both)) == {"hashes"}
        assert both.target._books.count_cached(OURS.chain(PROMPT, BEN)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_tenants_and_places_gives_the_right_tokens_and_no_others_kv(seed: int) -> None:
    """Each block of a tenant is computed before it is found, by whichever of three workers with one store between."""
    random = Random(seed)

    async def scenario() -> None:
        with ExitStack() as stack:
            store = MemoryStore(1 << 24)
            nodes = [Node([store], stack, blocks=24) for _ in range(3)]
            known: dict[tuple[int, bytes], int] = {}
            for _ in range(40):
                family, salt, blocks = random.randrange(2), random.choice(SALTS), random.randint(1, 10)
                prompt = [*prompt_of(family, blocks * BLOCK), 7]
                node = random.choice(nodes)
                await node.complete(prompt, salt=salt)
                found = node.rig.outputs[max(node.rig.outputs, key=lambda key: int(key.request))][0].cached_tokens
                assert found <= known.get((family, salt), 0)
                known[family, salt] = max(known.get((family, salt), 0), blocks * BLOCK)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_these_tests_would_notice_a_salt_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., list[BlockHash]] = type(HASHER).chain
    monkeypatch.setattr(
        type(HASHER),
        "chain",
        lambda self, tokens, behind=b"": plain(self, tokens, b"" if len(behind) == 32 else behind),
    )
    with pytest.raises(AssertionError):
        test_an_engine_finds_what_was_computed_under_the_same_salt_alone()
