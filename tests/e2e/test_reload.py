"""Other weights put in the place of those that are served: no request fails, and none has tokens of both."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_drain import PATIENT, admin, stream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from support.cluster import serve

TOKENS = 60
PROMPTS = [[*range(10, 42 + 16 * index), index] for index in range(4)]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape and vocabulary, in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        paths.append(tmp_path_factory.mktemp("version") / "tiny")
        transformers.LlamaForCausalLM(config).to(torch.float32).save_pretrained(paths[-1])
        tokenizer.save(str(paths[-1] / "tokenizer.json"))
    return paths


def right(path: Path) -> list[list[int]]:
    """What transformers says that this model's greedy outputs are."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        given = [torch.tensor([prompt]) for prompt in PROMPTS]
        outputs = [
            model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False) for prompt in given
        ]
    return [output[0, prompt.shape[1] :].tolist() for prompt, output in zip(given, outputs, strict=True)]


def test_other_weights_take_over_under_load_and_no_output_is_of_both(versions: list[Path], tmp_path: Path) -> None:
    before, after = (right(path) for path in versions)
    assert not any(old == new for old, new in zip(before, after, strict=True))
    served = tmp_path / "tiny"
    shutil.copytree(versions[0], served)
    pools = ["--policy", "replicated", "--mixed", "2", "--devices", "cpu:0,cpu:1", "--dtype", "float32"]
    # As much as others have that may share the tier meanwhile: it is kept to the least of their bounds.
    with serve(served, *pools, "--kv-memory", "64MiB", "--kv-host", "512MiB", *PATIENT) as cluster:
        over = threading.Event()
        outputs: list[list[list[int]]] = [[] for _ in PROMPTS]

        def client(index: int) -> None:
            body: dict[str, Any] = {"model": cluster.model, "prompt": PROMPTS[index], "max_tokens": TOKENS}
            body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": True}
            while not over.is_set():
                outputs[index].append(stream(cluster.url, body))

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            clients = [pool.submit(client, index) for index in range(len(PROMPTS))]
            try:
                cluster.wait(lambda _: all(outputs), "all have had outputs")
                coming = tmp_path / "coming"
                shutil.copy(versions[1] / "model.safetensors", coming)
                os.replace(coming, served / "model.safetensors")
                reloaded = admin(cluster, "reload")
                assert reloaded.returncode == 0, reloaded.stderr
                assert reloaded.stdout.splitlines()[-1] == "2 of 2 workers are reloaded"
                late = [len(each) + 2 for each in outputs]
                cluster.wait(
                    lambda _: all(len(each) > least for each, least in zip(outputs, late, strict=True)), "and more"
                )
            finally:
                over.set()
            for each in clients:
                each.result(60)
        for each, old, new in zip(outputs, before, after, strict=True):
            first = each.index(new)
            assert first > 0 and each[:first] == [old] * first and each[first:] == [new] * (len(each) - first)
        said = cluster.log.read_text()
        assert "is placed again" not in said and "has other weights; it waits" in said
        cluster.wait_idle()
