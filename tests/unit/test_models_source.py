"""From a model's name to its files and to a loaded model; what is missing or cut is refused with a remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file
from tiny_models import tiny_llama_gguf

from bascule import models
from bascule.errors import ModelError
from bascule.models.fingerprint import fingerprint
from bascule.models.source import ModelSource, SourceKind, resolve
from bascule.models.spec import spec_from_gguf


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory as transformers saves it, weights in one file."""
    import torch
    import transformers
    from test_models_tokenizer import byte_level_library

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    path = tmp_path / "tiny-llama"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    byte_level_library().save(str(path / "tokenizer.json"))
    return path


def shard(path: Path, count: int = 2) -> None:
    (path / "model.safetensors").unlink()
    names = [f"model-{number}-of-{count}.safetensors" for number in range(1, count + 1)]
    for name in names:
        save_file({name: np.zeros(8, np.float32)}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name for name in names}}))


def test_a_directory_is_a_model(directory: Path) -> None:
    source = resolve(str(directory))
    weights = (directory / "model.safetensors",)
    assert source == ModelSource("tiny-llama", SourceKind.SAFETENSORS, directory, weights)
    loaded = models.load(str(directory))
    assert (loaded.spec.hidden, loaded.spec.layers, loaded.chat_template) == (32, 2, None)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hello")) == "hello"


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    path = tiny_llama_gguf(tmp_path / "tiny-q4.gguf")
    loaded = models.load(str(path))
    assert loaded.source == ModelSource("tiny-q4", SourceKind.GGUF, path, (path,))
    assert loaded.chat_template is not None
    prompt = loaded.chat_template.render([{"role": "user", "content": "hi"}])
    assert loaded.tokenizer.encode(prompt, add_bos=False)[0] == loaded.spec.bos_token_id


def test_the_index_names_the_weight_files(directory: Path) -> None:
    shard(directory)
    save_file({"x": np.zeros(1, np.float32)}, directory / "extra.safetensors")
    assert [path.name for path in resolve(str(directory)).weights] == [
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
    ]


def drop_config(path: Path) -> None:
    (path / "config.json").unlink()


def drop_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickle_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def cut_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def empty_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def scribble_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"<html>404: not found</html>")


def drop_shard(path: Path) -> None:
    shard(path)
    (path / "model-2-of-2.safetensors").unlink()


def break_config(path: Path) -> None:
    (path / "config.json").write_text('{"hidden_size": ')


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (drop_config, r"has no config\.json"),
        (drop_weights, r"no \.safetensors file\. Save it"),
        (pickle_weights, r"pickles, which are never loaded"),
        (cut_weights, r"model\.safetensors is truncated: it has \d+ bytes of \d+"),
        (empty_weights, r"model\.safetensors is damaged"),
        (scribble_weights, r"model\.safetensors is truncated or no safetensors"),
        (drop_shard, r"lacks 1 of 2 weight files, first model-2-of-2\.safetensors"),
        (break_config, r"cannot read .*config\.json"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(
    directory: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(directory)
    with pytest.raises(ModelError, match=complaint):
        models.load(str(directory))


def test_a_directory_of_gguf_files_says_to_name_the_file(tmp_path: Path) -> None:
    tiny_llama_gguf(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match=r"to serve a GGUF file, name it: .*a\.gguf"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("smolm2", r"unknown model 'smolm2'\. Did you mean 'smollm2'\?"),
        ("absent.gguf", "no model file or directory absent.gguf"),
        ("./absent", "no model file or directory absent"),
        ("/no/such/place", "no model file or directory /no/such/place"),
        ("~no-such-user/place", "no model file or directory ~no-such-user/place"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        resolve(name)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"neither a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))


def test_a_hub_id_is_fetched_without_what_is_not_needed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve("org/Tiny-1.0")
    assert (source.name, source.path, asked["repository"]) == ("org/Tiny-1.0", directory, "org/Tiny-1.0")
    assert "*.safetensors" in asked["allow_patterns"]
    assert "consolidated*" in asked["ignore_patterns"]


def test_an_unreachable_hub_leaves_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"'org/name' .*\(Name or service not known\).*copy the model's directory"):
        resolve("org/name")


def test_fingerprints_differ_with_weights_dtype_and_spec_only(tmp_path: Path) -> None:
    from bascule.models.gguf_file import GgufFile

    path = tiny_llama_gguf(tmp_path / "a.gguf")
    spec = spec_from_gguf(GgufFile(path))
    first = fingerprint(resolve(str(path)), spec, "float32")
    assert len(bytes.fromhex(first)) == 32
    copy = path.rename(tmp_path / "b.gguf")
    source = resolve(str(copy))
    assert fingerprint(source, spec, "float32") == first
    assert fingerprint(source, spec, "bfloat16") != first
    assert fingerprint(source, spec_from_gguf(GgufFile(tiny_llama_gguf(path, context_length=128))), "float32") != first
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert fingerprint(source, spec, "float32") != first


def test_reading_models_needs_no_torch() -> None:
    code = "import sys, bascule.models, bascule.models.fingerprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
