"""A model's shape, read from config.json in both forms and from GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tiny_models import HEAD_DIM, llama_tensors, shape_metadata, tiny_llama_gguf, tokenizer_metadata, write_gguf

from bascule.errors import ModelError
from bascule.models.gguf_file import GgufFile
from bascule.models.spec import (
    SUPPORTED_ARCHITECTURES,
    ModelSpec,
    RopeKind,
    RopeScaling,
    spec_from_config,
    spec_from_gguf,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LLAMA3_SCALING = RopeScaling(
    kind=RopeKind.LLAMA3, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=256
)


def spec_of(generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    return spec_from_config(CONFIG | changes, generation or {}, "the model")


def test_plain_llama() -> None:
    assert spec_of() == ModelSpec(
        architecture="LlamaForCausalLM",
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=128,
        vocab=300,
        context=512,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(),
        norm_eps=1e-5,
        tied_embeddings=False,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        eos_token_ids=(2,),
        bos_token_id=1,
    )


def test_rope_is_read_from_the_keys_of_transformers_4_and_5() -> None:
    old = spec_of(rope_theta=5e5, rope_scaling=LLAMA3)
    new = spec_of(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (5e5, LLAMA3_SCALING)
    older = spec_of(rope_scaling={"type": "linear", "factor": 4.0})
    assert older.rope_scaling == RopeScaling(kind=RopeKind.LINEAR, factor=4.0)
    assert spec_of(rope_scaling=None).rope_scaling == RopeScaling()


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_rope_scalings_that_are_not_computed_are_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"'{kind}'.*default, linear and llama3"):
        spec_of(rope_scaling={"rope_type": kind, "factor": 4.0})


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_a_rope_scaling_without_its_numbers_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=f"{kind} rope scaling without 'factor'"):
        spec_of(rope_scaling={"rope_type": kind})


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (transformers.LlamaConfig(attention_bias=True, mlp_bias=True, num_key_value_heads=8), "LlamaForCausalLM"),
        (transformers.MistralConfig(sliding_window=None), "MistralForCausalLM"),
        (transformers.Qwen2Config(tie_word_embeddings=True), "Qwen2ForCausalLM"),
        (transformers.Qwen3Config(num_key_value_heads=8, eos_token_id=[5, 6]), "Qwen3ForCausalLM"),
    ],
    ids=SUPPORTED_ARCHITECTURES,
)
def test_configs_as_transformers_saves_them(
    tmp_path: Path, config: transformers.PretrainedConfig, architecture: str
) -> None:
    """Biases and norms are compared with the parameters that transformers itself would create."""
    import torch

    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    spec = spec_from_config(json.loads((tmp_path / "config.json").read_text()), {}, "the model")
    config.num_hidden_layers = 1
    with torch.device("meta"):
        weights = getattr(transformers, architecture)(config).state_dict()
    layer = "model.layers.0"
    assert spec.attention_bias == (f"{layer}.self_attn.q_proj.bias" in weights)
    assert spec.attention_bias == (f"{layer}.self_attn.v_proj.bias" in weights)
    assert spec.output_bias == (f"{layer}.self_attn.o_proj.bias" in weights)
    assert spec.mlp_bias == (f"{layer}.mlp.down_proj.bias" in weights)
    assert spec.qk_norm == (f"{layer}.self_attn.q_norm.weight" in weights)
    assert weights[f"{layer}.self_attn.k_proj.weight"].shape == (spec.kv_heads * spec.head_dim, spec.hidden)
    assert weights[f"{layer}.self_attn.q_proj.weight"].shape == (spec.heads * spec.head_dim, spec.hidden)
    assert spec.tied_embeddings == config.tie_word_embeddings
    assert spec.rope_theta == config.rope_parameters["rope_theta"]


def test_end_tokens_come_from_the_generation_config_first() -> None:
    assert spec_of({"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert spec_of({"eos_token_id": None}).eos_token_ids == (2,)
    assert spec_of(eos_token_id=None).eos_token_ids == ()


def test_a_window_shorter_than_the_context_cuts_the_context(caplog: pytest.LogCaptureFixture) -> None:
    spec = spec_of(architectures=["MistralForCausalLM"], sliding_window=128)
    assert (spec.context, spec.sliding_window) == (128, 128)
    assert "from 512" in caplog.text
    assert spec_of(architectures=["MistralForCausalLM"], sliding_window=None).context == 512


def test_qwens_window_counts_only_when_it_is_used() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}
    assert spec_of(**qwen, use_sliding_window=False).context == 512
    assert spec_of(**qwen, use_sliding_window=True).context == 128


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None, "model_type": "bert"}, "bert.*not supported"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive whole number"),
        ({"vocab_size": "many"}, "vocab_size must be a positive whole number, found 'many'"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"head_dim": 15}, "15 is odd"),
        ({"partial_rotary_factor": 0.5}, "50% of each head"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
    ],
)
def test_what_the_decoder_cannot_run_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        spec_of(**changes)


def test_gguf_metadata_gives_the_same_kind_of_spec(tmp_path: Path) -> None:
    spec = spec_from_gguf(GgufFile(tiny_llama_gguf(tmp_path / "m.gguf")))
    assert (spec.architecture, spec.layers, spec.heads, spec.kv_heads) == ("LlamaForCausalLM", 2, 4, 2)
    assert (spec.hidden, spec.head_dim, spec.intermediate, spec.context) == (32, 8, 64, 256)
    assert spec.tied_embeddings
    assert spec.norm_eps == np.float32(1e-5)
    assert spec.rope_scaling == RopeScaling()
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


def gguf_spec(
    path: Path, architecture: str = "llama", tensors: dict[str, Any] | None = None, **shape: Any
) -> ModelSpec:
    metadata = shape_metadata(architecture, **shape) | tokenizer_metadata()
    weights = llama_tensors() | (tensors or {})
    return spec_from_gguf(GgufFile(write_gguf(path / "m.gguf", metadata, weights, architecture=architecture)))


def test_gguf_biases_norms_and_head_are_known_by_their_tensors(tmp_path: Path) -> None:
    bias, norm = np.zeros(32, np.float32), np.ones(8, np.float32)
    qwen2 = gguf_spec(tmp_path, "qwen2", {"blk.0.attn_q.bias": bias, "output.weight": np.zeros((400, 32), np.float32)})
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.qk_norm, qwen2.tied_embeddings) == (
        True,
        False,
        False,
        False,
    )
    qwen3 = gguf_spec(tmp_path, "qwen3", {"blk.0.attn_q_norm.weight": norm, "blk.0.attn_k_norm.weight": norm})
    assert (qwen3.architecture, qwen3.qk_norm, qwen3.attention_bias) == ("Qwen3ForCausalLM", True, False)


def test_gguf_rope_scalings(tmp_path: Path) -> None:
    linear = gguf_spec(tmp_path, **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert linear.rope_scaling == RopeScaling(kind=RopeKind.LINEAR, factor=4.0)
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    scaled = gguf_spec(tmp_path, tensors={"rope_freqs.weight": factors})
    assert scaled.rope_scaling == RopeScaling(kind=RopeKind.FACTORS, factors=tuple(factors.tolist()))
    with pytest.raises(ModelError, match="'yarn'"):
        gguf_spec(tmp_path, **{"rope.scaling.type": "yarn"})


def test_gguf_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a gemma2 model.*LlamaForCausalLM.*llama, qwen2, qwen3"):
        gguf_spec(tmp_path, "gemma2")
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        gguf_spec(tmp_path, tensors={"blk.0.ffn_gate_inp.weight": np.zeros((4, 32), np.float32)})
    with pytest.raises(ModelError, match=r"rope\.dimension_count is 4"):
        gguf_spec(tmp_path, **{"rope.dimension_count": 4})
    with pytest.raises(ModelError, match="one part of a split model"):
        split = shape_metadata() | {"split.count": 3}
        spec_from_gguf(GgufFile(write_gguf(tmp_path / "s.gguf", split, llama_tensors())))
    with pytest.raises(ModelError, match="block_count must be a positive whole number"):
        gguf_spec(tmp_path, block_count=None)
