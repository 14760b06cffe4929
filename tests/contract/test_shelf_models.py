"""What a place says of the models whose blocks it has: readable names, which hurt nobody whoever wrote them."""

from __future__ import annotations

import msgspec
import pytest
from shelf_rig import LAYOUT, ONE, TWO, Ground

from bascule.kv.hashing import salt_of
from bascule.kv.store.description import MOST_BYTES, Description, description_name
from bascule.kv.store.inventory import NOBODY, audit, forget, models_called, name_models, take_stock
from bascule.kv.store.record import Payload, model_digest, pack


def test_a_model_is_found_by_the_name_that_it_was_served_as_with_all_its_fingerprints(ground: Ground) -> None:
    sizes = sum(len(ground.put(number, model=model)) for number, model in enumerate(("one", "two", "three")))
    names = [ground.describe("one"), ground.describe("two"), ground.describe("three", name="large")]
    ground.describe("four")
    ground.put_foreign()
    stock = take_stock(ground.shelf)
    assert (stock.blocks, stock.bytes, stock.faults) == (3, sizes, {}), "what is said of models is no block"
    assert stock.models[ONE] == Description("one", "small", LAYOUT)
    assert {holding.name for holding in stock.holdings} == {""}
    name_models([stock])
    assert {holding.model: (holding.name, holding.dtype) for holding in stock.holdings} == {
        ONE: ("small", "float32"),
        TWO: ("small", "float32"),
        model_digest("three").hex(): ("large", "float32"),
    }
    assert models_called([stock], "small") == {ONE, TWO}
    found = audit(ground.shelf, drop=True)
    assert (found.blocks, found.valid, found.faults, found.dropped) == (3, 3, {}, 0)
    assert forget(ground.shelf, {ONE, TWO}) == 2
    assert ground.store.holds(names) == [False, False, True], "what is said of a model goes with its blocks"
    assert forget(ground.shelf, tenants={NOBODY}) == 1
    assert ground.store.holds(names[2:]) == [True], "it belongs to no tenant, nor to nobody"
    ground.put(9)
    assert forget(ground.shelf) == 1
    assert ground.store.holds(names) == 3 * [False]
    assert ground.foreign_is_whole()


AT_ONE = description_name(model_digest("one"))
PLAIN = msgspec.json.encode(Description("one", "small", LAYOUT))


def said(text: bytes, model: str = "one", secret: str = "") -> bytes:
    """A record of the model that says this, where what is said of the model `one` is looked for."""
    return pack(AT_ONE, model, (), Payload("description", text), salt_of(secret))


HOSTILE = {
    "another model's": said(PLAIN, model="two"),
    "of another fingerprint": said(PLAIN.replace(b"one", b"two")),
    "a tenant's": said(PLAIN, secret="ann"),
    "no JSON": said(b"\x00\xff{"),
    "nested": said(b"[" * 3000),
    "with a terminal's codes": said(PLAIN.replace(b"small", rb"\u001b[31m")),
    "turned round": said(PLAIN.replace(b"small", rb"\u202e")),
    "too long a name": said(PLAIN.replace(b"small", b"x" * 201)),
    "no name": said(PLAIN.replace(b"small", b"")),
    "too large": said(PLAIN + b" " * MOST_BYTES),
    "huge numbers": said(PLAIN.replace(b"16", b"1" * 400)),
    "flipped": said(PLAIN).replace(b"small", b"smell"),
    "cut": said(PLAIN)[:-1],
    "empty": b"",
}


@pytest.mark.parametrize("way", HOSTILE)
def test_what_anybody_else_says_of_a_model_is_left_out_and_hurts_nothing(ground: Ground, way: str) -> None:
    ground.put(1)
    assert ground.describe() == AT_ONE
    assert take_stock(ground.shelf).models == {ONE: Description("one", "small", LAYOUT)}
    assert ground.store.get([AT_ONE]) == [said(PLAIN)] and ground.store.put({AT_ONE: HOSTILE[way]}) == 1
    stock = take_stock(ground.shelf)
    name_models([stock])
    assert stock.models == {}
    assert {holding.name for holding in stock.holdings} == {""}
    assert models_called([stock], "one") == {ONE} and models_called([stock], "small") == set()
    audit(ground.shelf, drop=True)
    assert forget(ground.shelf) == 1
