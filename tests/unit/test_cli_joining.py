"""What `bascule doctor --join` makes of the router's answer: a line for each way in which a worker would not fit."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import msgspec
import pytest
from membership_rig import offer
from msgspec.structs import replace

from bascule import __version__
from bascule.cli import joining as at_router
from bascule.cli.fitness import Level
from bascule.cli.joining import compared
from bascule.config import EngineConfig, HandoffConfig, ModelConfig, StoreConfig
from bascule.engine.mock import mock_card
from bascule.errors import RegistrationRefused
from bascule.models import load
from bascule.router.view import ClusterView
from bascule.types import ModelCard, WorkerId
from bascule.wire import VERSION, Neighbour, Probed, Starting, encode, from_router
from bascule.worker.card import offered_card

CARD = mock_card()
LAYOUT = CARD.layout
DIFFERENT = [
    (replace(CARD, layout=replace(LAYOUT, dtype="float32")), "dtype uint8 here, float32 at", "--dtype"),
    (replace(CARD, layout=replace(LAYOUT, block_size=32)), "block size 16 here, 32 at", "--block-size"),
    (
        replace(CARD, layout=replace(LAYOUT, kv_heads=3)),
        "1 heads of 8 here, 2 layers with 3",
        "same model",
    ),
    (replace(CARD, vocab=7), "vocabulary of 32000 here, 7 at", "same model"),
    (replace(CARD, context=7), "context length 8192 here, 7 at", "--max-model-len"),
    (replace(CARD, fingerprint="f" * 32), f"here, {'f' * 16} at", "--quantize"),
    (replace(CARD, fingerprint=CARD.fingerprint + "+push-int4"), "codecs none here, push-int4 at", "--transfer-codec"),
]


def join(card: ModelCard, there: ModelCard) -> None:
    """What a router whose first worker brought `there` does with one with `card`."""
    view = ClusterView()
    view.add(replace(offer("first"), card=there), 0.0)
    view.check(replace(offer("second"), card=card))


def is_taken(card: ModelCard, there: ModelCard) -> bool:
    try:
        join(card, there)
    except RegistrationRefused:
        return False
    return True


@pytest.mark.parametrize(("there", "what", "mend"), DIFFERENT)
def test_each_difference_is_a_line_that_says_what_where_and_how_to_mend(there: ModelCard, what: str, mend: str) -> None:
    [finding] = compared(CARD, there)
    assert finding.level is Level.WRONG
    assert what in finding.what and mend in finding.mend
    with pytest.raises(RegistrationRefused) as refused:
        join(CARD, there)
    ours = what.split("here, ")[0].strip()
    assert ours in str(refused.value) and mend in str(refused.value), "what doctor calls wrong is refused alike"
    assert CARD.fingerprint not in str(refused.value)


@pytest.mark.parametrize("name", LAYOUT.__struct_fields__)
def test_no_difference_of_layout_is_taken(name: str) -> None:
    other = "float32" if name == "dtype" else 3
    assert not is_taken(replace(CARD, layout=replace(LAYOUT, **{name: other})), CARD)


def test_a_refusal_names_all_that_differs_and_what_else_would_do() -> None:
    here = replace(CARD, layout=replace(LAYOUT, dtype="float32", block_size=32), fingerprint="f" * 32)
    with pytest.raises(RegistrationRefused) as refused:
        join(here, CARD)
    assert str(refused.value) == (
        "worker second (mock) differs from this cluster's workers (mock): dtype float32 instead of uint8, block size "
        "32 instead of 16; start all workers with the same --engine and --dtype, --block-size, or let workers like "
        "this one take over with bascule admin reload"
    )
    with pytest.raises(RegistrationRefused) as refused:
        join(replace(CARD, context=7), CARD)
    assert "reload" not in str(refused.value), "other contexts are never let in by it"


def test_what_a_router_takes_has_one_good_line() -> None:
    [finding] = compared(CARD, replace(CARD, name="of another name", tokenizer="told"))
    assert finding.level is Level.OK
    assert is_taken(CARD, replace(CARD, name="of another name"))


def test_weights_are_not_blamed_for_what_another_difference_does_to_the_fingerprint() -> None:
    there = mock_card(context=100, block_size=32)
    assert [finding.what.split(" here")[0] for finding in compared(CARD, there)] == [
        "block size 16",
        "context length 8192",
    ]


def found_at(answer: Probed, monkeypatch: pytest.MonkeyPatch, name: str | None = None) -> dict[Level, list[str]]:
    """What is wrong or in doubt, and what is fine, for a worker here at a router that answers so."""

    async def ask(*_: object) -> Probed:
        return replace(answer, clock=time.time())

    monkeypatch.setattr(at_router, "_ask", ask)
    lines: dict[Level, list[str]] = {level: [] for level in Level}
    for finding in asyncio.run(at_router.joining("tcp://x:1", "127.0.0.1", None, CARD, name)):
        lines[finding.level].append(finding.line)
    return lines


def test_workers_that_this_host_does_not_reach_and_a_name_that_is_taken_are_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = f"127.0.0.1:{gone.getsockname()[1]}"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        near, far = Neighbour(WorkerId("near"), (here,)), Neighbour(WorkerId("far"), (here, nobody))
        fine = Probed(VERSION, __version__, 0.0, "", card=CARD, members=(near, Neighbour(WorkerId("at-0"), ())))
        fine = replace(fine, from_workers={near.worker: ""})
        good = found_at(fine, monkeypatch, "mine")
        bad = found_at(replace(fine, members=(near, far)), monkeypatch, "near")
        silent = found_at(replace(fine, from_workers={}), monkeypatch, "near")
        shut = found_at(replace(fine, from_workers={near.worker: f"{nobody} (no answer)"}), monkeypatch)
        attached = found_at(fine, monkeypatch, "at-0")
        older = found_at(replace(fine, from_workers=None), monkeypatch)
    assert good[Level.DOUBT] == good[Level.WRONG] == []
    assert "this host connects to the cluster's workers (1 tried)" in good[Level.OK]
    assert "the name mine is free" in good[Level.OK]
    there = "the cluster's workers connect to this host (1 tried)"
    assert [there in found[Level.OK] for found in (good, silent, shut, older)] == [True, False, False, False]
    assert older[Level.DOUBT] == []
    assert "the name at-0 is taken by another in the cluster" in attached[Level.WRONG][0]
    [[unheard, replaced], [refused]] = silent[Level.DOUBT], shut[Level.DOUBT]
    assert replaced.startswith(
        "worker near of the cluster does not answer; a worker of that name takes its place; give"
    )
    assert unheard.startswith("worker near did not tell in time whether it connects to this host; see in its log")
    assert refused.startswith(f"worker near cannot connect to this host at {nobody} (no answer); check --host, and")
    [doubt, untold], [wrong] = bad[Level.DOUBT], bad[Level.WRONG]
    assert f"cannot connect to worker far at {nobody} (connection refused); check its --host" in doubt
    assert untold.startswith("worker far did not tell in time")
    assert wrong == "the name near is taken by another in the cluster; give another with --id, or stop that one first"


def test_the_vocabulary_of_attached_servers_binds_the_first_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Probed(VERSION, __version__, 0.0, "", attached_vocab=CARD.vocab)
    assert found_at(answer, monkeypatch)[Level.WRONG] == []
    [line] = found_at(replace(answer, attached_vocab=7), monkeypatch)[Level.WRONG]
    assert line.startswith(f"vocabulary of {CARD.vocab} here, 7 at the attached servers; start router and workers")


def test_an_older_routers_answer_has_no_card_and_an_older_doctor_leaves_it_out() -> None:
    old = msgspec.defstruct(
        "Probed",
        [("version", int), ("release", str), ("clock", float), ("tokenizer", str), ("unreachable", str, "")],
        tag=True,
    )
    read = from_router(encode(old(VERSION, "0.0.1", 1.0, "digest")))
    assert isinstance(read, Probed) and read.card is None
    told = encode(Probed(VERSION, "0.0.2", 1.0, "digest", card=CARD))
    assert msgspec.msgpack.decode(told, type=old).tokenizer == "digest"
    assert from_router(told).card == CARD  # type: ignore[union-attr]
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encode(Starting(offer("w").worker, "")), type=old)


def test_the_card_of_a_real_model_is_known_without_its_weights(smollm2: Path) -> None:
    loaded = load(str(smollm2))

    def card(**form: str) -> ModelCard:
        config = ModelConfig(**form)  # type: ignore[arg-type]
        return offered_card("m", loaded, config, EngineConfig(), HandoffConfig(), StoreConfig())

    ours = card()
    assert len(ours.fingerprint) == 64 and ours.tokenizer == loaded.tokenizer.digest
    assert compared(ours, card(quantize="none"))[0].level is Level.OK
    [weights] = compared(ours, card(quantize="int4"))
    assert weights.what.startswith("model fingerprint") and "--quantize" in weights.mend
    [dtype] = compared(ours, card(dtype="float32"))
    assert dtype.what.startswith("dtype bfloat16 here")
