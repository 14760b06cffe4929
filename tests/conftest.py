"""Fixtures that cost much and are made once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from support.oracle import LONG_OUTPUT_TOKENS, OUTPUT_TOKENS, Reference, generate, kept, prompts, reference_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "BASCULE_TEST_DEVICE" not in os.environ:  # which names a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

_WITH_SERVERS = ("tests/chaos/", "tests/e2e/", "tests/parity/")
_LIGHT = ("attached", "bench_compare", "bench_front", "bench_handoff", "doctor", "drain", "explain", "lifecycle")
_LIGHT += ("plug_in", "probe", "reload", "router_restart", "security", "strangers")
_WITH_LIGHT_SERVERS = tuple(f"tests/e2e/test_{name}.py" for name in _LIGHT)
"""Servers of a mock engine nearly all, and nothing that compares times: these may run beside any others."""


class ServersApart(LoadScopeScheduling):
    """Spreads tests over processes, but for those that start servers: these run one after the other, in two lines."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(_WITH_LIGHT_SERVERS):
            return "light servers"
        return "servers" if nodeid.startswith(_WITH_SERVERS) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ServersApart:
    return ServersApart(config, log)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's GGUF file, pulled if need be."""
    from bascule.models import catalog

    return catalog.pull("smollm2")


@pytest.fixture(scope="session")
def references(smollm2: Path, request: pytest.FixtureRequest) -> list[Reference]:
    """Greedy float32 references of prompts of 5 to 1,500 tokens; kept in pytest's cache between runs."""
    return _references(smollm2, request.config, OUTPUT_TOKENS)


@pytest.fixture(scope="session")
def long_references(smollm2: Path, request: pytest.FixtureRequest) -> list[Reference]:
    """The same prompts with longer outputs."""
    return _references(smollm2, request.config, LONG_OUTPUT_TOKENS)


def _references(smollm2: Path, config: pytest.Config, tokens: int) -> list[Reference]:
    from bascule.models import load

    wanted = prompts(load("smollm2").tokenizer.encode)

    def make() -> list[tuple[object, ...]]:
        model = reference_model(smollm2, "float32")
        made = [generate(model, prompt, tokens) for prompt in wanted]
        return [(one.prompt, one.output, one.gaps, one.tops) for one in made]

    return [Reference(*one) for one in kept(config, f"references-3-{tokens}", wanted, make)]
