"""What `bascule doctor --join` makes of the router's answer: a line for each way in which a worker would not fit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from membership_rig import offer
from msgspec.structs import replace

from bascule.cli.fitness import Level
from bascule.cli.joining import compared
from bascule.config import EngineConfig, HandoffConfig, ModelConfig, StoreConfig
from bascule.engine.mock import mock_card
from bascule.errors import RegistrationRefused
from bascule.models import load
from bascule.router.view import ClusterView
from bascule.types import ModelCard
from bascule.wire import VERSION, Probed, Starting, encode, from_router
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


def is_taken(card: ModelCard, there: ModelCard) -> bool:
    """Whether a router whose first worker brought `there` takes in one with `card`."""
    view = ClusterView()
    view.add(replace(offer("first"), card=there), 0.0)
    try:
        view.check(replace(offer("second"), card=card))
    except RegistrationRefused:
        return False
    return True


@pytest.mark.parametrize(("there", "what", "mend"), DIFFERENT)
def test_each_difference_is_a_line_that_says_what_where_and_how_to_mend(there: ModelCard, what: str, mend: str) -> None:
    [finding] = compared(CARD, there)
    assert finding.level is Level.WRONG
    assert what in finding.what and mend in finding.mend
    assert not is_taken(CARD, there), "what doctor calls wrong is refused"


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
