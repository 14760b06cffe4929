"""Blocks stay where they are when servers come and go, but for the share of those that did."""

from __future__ import annotations

from collections import Counter

import pytest
from blake3 import blake3

from bascule.kv.store.ring import Ring
from bascule.types import BlockHash

NAMES = [BlockHash(blake3(str(number).encode()).digest(16)) for number in range(20_000)]
THREE = ["alpha:6379/0", "beta:6379/0", "gamma:6379/0"]


@pytest.mark.parametrize("fourth", ["delta:6379/0", "10.0.0.4:6379/0", "/run/redis.sock#0", "alpha:6380/0"])
def test_a_fourth_server_takes_at_most_30_percent_and_moves_nothing_else(fourth: str) -> None:
    three, four = Ring(THREE), Ring([*THREE, fourth])
    moved = [name for name in NAMES if three.owner(name) != four.owner(name)]
    assert {four.owner(name) for name in moved} == {fourth}
    assert 0.20 * len(NAMES) <= len(moved) <= 0.30 * len(NAMES)


@pytest.mark.parametrize("lost", THREE)
def test_losing_a_server_loses_only_its_share(lost: str) -> None:
    three, two = Ring(THREE), Ring([server for server in THREE if server != lost])
    moved = [name for name in NAMES if three.owner(name) != two.owner(name)]
    assert {three.owner(name) for name in moved} == {lost}
    assert len(moved) == sum(three.owner(name) == lost for name in NAMES)


@pytest.mark.parametrize("gone", [THREE[:1], THREE[1:]])
def test_while_servers_are_gone_their_share_is_that_of_a_ring_without_them(gone: list[str]) -> None:
    three, rest = Ring(THREE), Ring([server for server in THREE if server not in gone])
    assert all(three.owner(name, gone) == rest.owner(name) for name in NAMES)
    places = range(500)
    assert three.group(NAMES, places, set(gone)) == rest.group(NAMES, places)
    assert three.group(NAMES, places, passed={place: set(gone) for place in places}) == rest.group(NAMES, places)


def test_shares_are_about_equal() -> None:
    ring = Ring(THREE)
    shares = Counter(ring.owner(name) for name in NAMES)
    assert all(0.28 <= shares[server] / len(NAMES) <= 0.39 for server in THREE)


def test_the_order_in_which_servers_are_named_does_not_matter() -> None:
    one, other = Ring(THREE), Ring(THREE[::-1])
    assert all(one.owner(name) == other.owner(name) for name in NAMES[:1000])


def test_names_are_grouped_by_server_in_order() -> None:
    ring = Ring(THREE)
    groups = ring.group(NAMES, range(50))
    assert sorted(place for places in groups.values() for place in places) == list(range(50))
    for server, places in groups.items():
        assert places == sorted(places)
        assert {ring.owner(NAMES[place]) for place in places} == {server}


def test_names_that_are_not_random_are_spread_too() -> None:
    ring = Ring(THREE)
    shares = Counter(ring.owner(BlockHash(number.to_bytes(16, "big"))) for number in range(3000))
    assert min(shares.values()) > 700


@pytest.mark.parametrize("servers", [[], ["a", "a"]])
def test_no_server_or_one_named_twice_is_an_error(servers: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Ring(servers)
