"""One router and one worker for all that is sent to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.live import Live, live


@pytest.fixture(scope="session")
def target(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("fuzz")) as both:
        yield both
