"""Fixtures that cost much and are made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.oracle import OUTPUT_TOKENS, Reference, generate, kept, prompts, reference_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's GGUF file, pulled if need be."""
    from bascule.models import catalog

    return catalog.pull("smollm2")


@pytest.fixture(scope="session")
def references(smollm2: Path, request: pytest.FixtureRequest) -> list[Reference]:
    """Greedy float32 references of prompts of 5 to 1,500 tokens; kept in pytest's cache between runs."""
    from bascule.models import load

    wanted = prompts(load("smollm2").tokenizer.encode)

    def make() -> list[tuple[object, ...]]:
        model = reference_model(smollm2, "float32")
        made = [generate(model, prompt) for prompt in wanted]
        return [(one.prompt, one.output, one.gaps, one.tops) for one in made]

    return [Reference(*one) for one in kept(request.config, f"references-3-{OUTPUT_TOKENS}", wanted, make)]
