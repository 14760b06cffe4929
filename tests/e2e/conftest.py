"""Two hosts within this machine, where it can make them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bascule.bench.namespaces import Cable, two_hosts, why_not


@pytest.fixture(scope="session")
def hosts_can_be_made() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(f"two hosts cannot be made within this machine: {reason}")


@pytest.fixture(scope="module")
def cable(hosts_can_be_made: None) -> Iterator[Cable]:
    """Two hosts and what joins them, as fast as this machine until a test slows it down."""
    with two_hosts() as made:
        yield made
