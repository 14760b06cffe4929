"""The native kernels against torch in float32 over the very same numbers, in every form of the weights."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch_support import save_random

from bascule.engine.native import build
from bascule.engine.protocol import Slice
from bascule.engine.torch import forms
from bascule.engine.torch.forms import load_decoders
from bascule.engine.torch.model import Decoder
from bascule.engine.torch.native import NativeDecoder, why_not
from bascule.engine.torch.packed import kept, pack
from bascule.engine.torch.packing import Quantised, quantise, quantised_as_stored
from bascule.engine.torch.plan import plan_step
from bascule.engine.torch.weights import WeightForm, load_native_weights
from bascule.errors import ConfigError
from bascule.models.gguf_file import RawTensor
from bascule.models.hf_directory import ModelDirectory
from bascule.models.source import resolve
from bascule.models.spec import ModelSpec
from bascule.native import DIGEST_BYTES, DISABLE, NativeUnavailable, cpu_flags
from bascule.types import SamplingParams

BLOCK = 16
BLOCKS = 48
DRAW = SamplingParams(max_tokens=1, temperature=0.0)
SHAPE = {
    "vocab_size": 141,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama-untied-heads-of-64": (transformers.LlamaConfig, {"head_dim": 64, "tie_word_embeddings": False}),
    "llama-all-biases": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral-heads-of-96-no-gqa": (
        transformers.MistralConfig,
        {"head_dim": 96, "num_key_value_heads": 6, "sliding_window": None},
    ),
    "qwen3-normed-heads-of-128": (transformers.Qwen3Config, {"head_dim": 128}),
}
STEPS = ([5], [1], [1], [3, 70], [1, 1], [64, 1], [130, 1], [1, 17], [1, 1])
"""Tokens that each sequence gets in each step: chunks below, at and above every tile and block of the kernels."""

native = pytest.mark.skipif(bool(build.NEEDED - cpu_flags()), reason="this CPU has no AVX-512 bfloat16")


def saved(name: str, directory: Path) -> ModelSpec:
    config_class, changes = MODELS[name]
    save_random(config_class(**(SHAPE | changes)), directory, seed=11, vectors=0.2, matrices=0.1)
    return ModelDirectory(directory).spec()


def reference(spec: ModelSpec, weights: Mapping[str, Tensor | Quantised]) -> Decoder:
    """Torch's decoder in float32 over the numbers that the packed ones stand for."""
    return Decoder(
        spec,
        {
            name: value.dequantised() if isinstance(value, Quantised) else value.float()
            for name, value in weights.items()
        },
    )


@torch.inference_mode()
def distributions(decoder: forms.Forward, spec: ModelSpec, dtype: torch.dtype) -> Tensor:
    """Log probabilities after every slice of STEPS, over KV memory that is NaN wherever nobody has written."""
    kv = torch.full((2 * spec.layers, BLOCKS * BLOCK, spec.kv_heads, spec.head_dim), float("nan"), dtype=dtype)
    order = list(range(BLOCKS))
    random.Random(3).shuffle(order)
    tables = [[block for block in order if block % 2 == 0], sorted(block for block in order if block % 2)]
    known = [torch.randint(0, spec.vocab, (400,), generator=torch.Generator().manual_seed(s)).tolist() for s in (1, 2)]
    done = [0, 0]
    found = []
    for counts in STEPS:
        batch = []
        for index, count in enumerate(counts):
            tokens = known[index][done[index] : done[index] + count]
            batch.append(Slice(tokens, done[index], tables[index], DRAW))
            done[index] += count
        found.append(decoder.forward(plan_step(batch, BLOCK), kv).clone())
    return torch.cat(found).log_softmax(dim=-1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packed weights of these tests go nowhere else; the compiled kernels are loaded before, from where they are."""
    if not build.NEEDED - cpu_flags():
        build.load()
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BASCULE_CACHE", str(folder))
    return folder


@native
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_form_computes_what_its_numbers_say(name: str, form: WeightForm, threads: int, tmp_path: Path) -> None:
    spec = saved(name, tmp_path)
    weights = load_native_weights(spec, resolve(str(tmp_path)), form)
    assert any(isinstance(weight, Quantised) for weight in weights.values()) == (form != "none")
    expected = distributions(reference(spec, dict(weights)), spec, torch.float32)
    got = distributions(NativeDecoder(spec, pack(spec, weights), threads), spec, torch.bfloat16)
    assert got.isfinite().all()
    assert (got - expected).abs().mean() < 0.02
    assert (got - expected).abs().max() < 0.2
    # The bound above would not notice a small systematic mistake; torch's own rounding to bfloat16 is the measure.
    dense = forms._dense(load_native_weights(spec, resolve(str(tmp_path)), form))
    rounded = Decoder(spec, {name: weight.bfloat16() for name, weight in dense.items()})
    torch_error = (distributions(rounded, spec, torch.bfloat16) - expected).abs().mean()
    assert (got - expected).abs().mean() < 1.5 * torch_error


@native
def test_the_number_of_threads_and_the_company_in_a_step_change_nothing(tmp_path: Path) -> None:
    spec = saved("llama-untied-heads-of-64", tmp_path)
    decoders = [
        NativeDecoder(spec, pack(spec, load_native_weights(spec, resolve(str(tmp_path)), "int4")), n) for n in (1, 2)
    ]
    one, two = (distributions(decoder, spec, torch.bfloat16) for decoder in decoders)
    assert torch.equal(one, two)


@native
def test_codes_are_for_few_tokens_and_their_dense_twin_for_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "cpu_flags", lambda: cpu_flags() - {"amx_bf16"})
    spec = saved("llama-all-biases", tmp_path)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "threads": 1}
    both = load_decoders(spec, resolve(str(tmp_path)), **options, quantize="int4", dense_twin=True)
    assert isinstance(both.few, NativeDecoder)
    assert both.for_rows(forms.FEW) is both.few
    assert both.for_rows(forms.FEW + 1) is both.many is not both.few
    lean = load_decoders(spec, resolve(str(tmp_path)), **options, quantize="int4", dense_twin=False)
    assert lean.few is lean.many
    assert isinstance(lean.few, NativeDecoder)
    assert lean.few.weight_bytes < 0.4 * weight_bytes(both.many)
    # The same codes, unpacked in the one and multiplied out before packing in the other.
    many, few = (distributions(decoder, spec, torch.bfloat16) for decoder in (both.many, lean.many))
    assert (many - few).abs().mean() < 0.02


def weight_bytes(decoder: forms.Forward) -> int:
    assert isinstance(decoder, NativeDecoder)
    return decoder.weight_bytes


@native
def test_with_matrix_tiles_torch_computes_large_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "cpu_flags", lambda: cpu_flags() | {"amx_bf16"})
    spec = saved("qwen3-normed-heads-of-128", tmp_path)
    found = load_decoders(
        spec,
        resolve(str(tmp_path)),
        torch.bfloat16,
        torch.device("cpu"),
        1,
        quantize="int8",
        dense_twin=True,
    )
    assert isinstance(found.few, NativeDecoder)
    assert isinstance(found.many, Decoder)
    few, many = (distributions(decoder, spec, torch.bfloat16) for decoder in (found.few, found.many))
    assert (few - many).abs().mean() < 0.03


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_stored_codes_stand_for_exactly_the_stored_numbers(kind: str) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(5).normal(size=(6, 96)).astype(np.float32)
    raw = RawTensor(name="w", type=type_, shape=values.shape, data=gguf.quants.quantize(values, type_))
    codes = quantised_as_stored(raw)
    assert codes is not None
    assert np.array_equal(codes.dequantised().numpy(), raw.dequantised())


def test_what_is_not_stored_as_codes_has_none() -> None:
    values = np.ones((2, 32), np.float16)
    raw = RawTensor(name="w", type=gguf.GGMLQuantizationType.F16, shape=values.shape, data=values.view(np.uint8))
    assert quantised_as_stored(raw) is None


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 15)])
def test_quantising_rounds_to_half_a_level_at_most(bits: int, levels: int) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    weight[3] = 0.25
    weight[4] = 0.0
    groups = weight.view(5, 2, 32)
    span = groups.abs().amax(-1) if bits == 8 else groups.amax(-1) - groups.amin(-1)
    allowed = (span / levels * 0.5 + groups.abs().amax(-1) * 2**-9).repeat_interleave(32, dim=1)
    assert ((quantise(weight, bits).dequantised() - weight).abs() <= allowed + 1e-7).all()


def test_without_kernels_torch_computes_and_codes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE, "1")
    build.load.cache_clear()
    try:
        spec = saved("llama-all-biases", tmp_path)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "threads": 1}
        found = load_decoders(spec, resolve(str(tmp_path)), **options, quantize="auto", dense_twin=True)
        assert isinstance(found.few, Decoder)
        with pytest.raises(ConfigError, match="quantize int4 cannot be had: native kernels are switched off"):
            load_decoders(spec, resolve(str(tmp_path)), **options, quantize="int4", dense_twin=True)
    finally:
        build.load.cache_clear()


def test_a_shape_that_the_kernels_cannot_take_is_named(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**(SHAPE | {"hidden_size": 72, "head_dim": 24}))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    reason = why_not(ModelDirectory(tmp_path).spec())
    assert reason == "the native kernels want multiples of 32, the model has hidden size 72, head size 24"


@native
def test_a_damaged_library_is_compiled_again_not_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that has the real library ready and keeps a list of what it was asked for: compiling takes long."""
    ready, asked, compiler = cache / "ready.so", cache / "asked", cache / "cc"
    ready.write_bytes(Path(build.load()._name).read_bytes()[:-DIGEST_BYTES])
    compiler.write_text(f'#!/bin/sh\necho "$@" >>{asked}\nwhile [ "$1" != -o ]; do shift; done\nexec cp {ready} "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))

    def loaded() -> Path:
        build.load.cache_clear()
        return Path(build.load()._name)

    try:
        file = loaded()
        assert file.is_relative_to(cache)
        content = file.read_bytes()
        for damage in (content[: len(content) // 2], b"", bytes(1000) + content[1000:]):
            file.unlink()
            file.write_bytes(damage)
            assert loaded() == file
            assert file.read_bytes() == content
        commands = asked.read_text().splitlines()
        assert len(commands) == 4
        assert all(str(source) in command for command in commands for source in Path(build.__file__).parent.glob("*.c"))
    finally:
        build.load.cache_clear()


@native
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "cache"))
    build.load.cache_clear()
    try:
        with pytest.raises(NativeUnavailable, match="no such instruction"):
            build.load()
    finally:
        build.load.cache_clear()


def test_packed_weights_are_mapped_from_one_file_and_made_again_when_it_is_damaged(tmp_path: Path, cache: Path) -> None:
    spec = saved("qwen3-normed-heads-of-128", tmp_path)
    made = 0

    def make() -> Any:
        nonlocal made
        made += 1
        return pack(spec, load_native_weights(spec, resolve(str(tmp_path)), "int4"))

    first, second = kept("a model", make), kept("a model", make)
    assert made == 1
    assert first.parts == second.parts
    assert np.array_equal(first.data, second.data)
    assert not first.data.flags.writeable
    [file] = (cache / "packed").glob("*.bin")
    content = bytearray(file.read_bytes())
    flipped = [
        bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]) for at in (3, 9, 20, 60, len(content) - 1)
    ]
    for damage in (*flipped, bytes(content[:5000]), b"", b"something else"):
        file.unlink()  # those who have it mapped keep what they have
        file.write_bytes(damage)
        assert np.array_equal(kept("a model", make).data, first.data)
        assert file.read_bytes() == bytes(content)
    assert made == 9
    kept("another model", make)
    assert made == 10
    assert len(list((cache / "packed").glob("*.bin"))) == 2


@native
def test_what_is_out_of_bounds_is_refused_before_the_kernels_see_it(tmp_path: Path) -> None:
    spec = saved("llama-all-biases", tmp_path)
    decoder = NativeDecoder(spec, pack(spec, load_native_weights(spec, resolve(str(tmp_path)), "none")), 1)
    kv = torch.zeros((2 * spec.layers, 2 * BLOCK, spec.kv_heads, spec.head_dim), dtype=torch.bfloat16)
    for tokens, blocks, what in (
        ([1, 141], [0], "token"),
        ([-1], [0], "token"),
        ([1, 2], [2], "slot"),
        ([1], [-1], "slot"),
    ):
        with pytest.raises(IndexError, match=f"a {what}"):
            decoder.forward(plan_step([Slice(tokens, 0, blocks, DRAW)], BLOCK), kv)
    with pytest.raises(IndexError, match="a slot"):
        decoder.forward(plan_step([Slice([1], 2 * BLOCK, [0, 7, 1], DRAW)], BLOCK), kv)


@native
def test_damaged_kv_is_noticed_not_averaged_away(tmp_path: Path) -> None:
    spec = saved("llama-all-biases", tmp_path)
    decoder = NativeDecoder(spec, pack(spec, load_native_weights(spec, resolve(str(tmp_path)), "none")), 1)
    for broken in (float("nan"), float("inf")):
        for start in (3, 40):  # one tile in registers; many tiles over packed copies
            kv = torch.zeros((2 * spec.layers, 4 * BLOCK, spec.kv_heads, spec.head_dim), dtype=torch.bfloat16)
            decoder.forward(plan_step([Slice([5] * start, 0, range(4), None)], BLOCK), kv)
            kv[0, 1, :, 0] = broken  # a key whose value is whole
            for tokens in ([7], [7] * 20):
                logits = decoder.forward(plan_step([Slice(tokens, start, range(4), DRAW)], BLOCK), kv.clone())
                assert not logits.isfinite().all()


def test_a_cache_that_cannot_be_written_costs_speed_not_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "file"))
    build.load.cache_clear()
    try:
        with pytest.raises(NativeUnavailable):
            build.load()
    finally:
        build.load.cache_clear()


def test_packed_weights_stay_in_memory_where_no_file_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = saved("llama-all-biases", tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BASCULE_CACHE", str(tmp_path / "file"))
    weights = kept("a model", lambda: pack(spec, load_native_weights(spec, resolve(str(tmp_path / "model")), "none")))
    assert "layers.1.down" in weights.parts
