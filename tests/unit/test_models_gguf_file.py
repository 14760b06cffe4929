"""Reading GGUF files: values, names, row order, and files that are not whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from tiny_models import HEAD_DIM, HEADS, KV_HEADS, llama_tensors, shape_metadata, tiny_llama_gguf, write_gguf

from bascule.errors import ModelError
from bascule.models.gguf_file import GgufFile


def llama_cpp_order(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The row order in which llama.cpp's converter stores q and k: halves of a head interleaved."""
    per_head = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return per_head.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(
    "stored", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0], ids=lambda kind: kind.name
)
def test_values_are_those_of_the_gguf_package_for_each_storage_type(tmp_path: Path, stored: Type) -> None:
    values = llama_tensors()["blk.0.ffn_down.weight"]
    path = write_gguf(
        tmp_path / "m.gguf", {}, {"blk.0.ffn_down.weight": values}, stored={"blk.0.ffn_down.weight": stored}
    )
    found = GgufFile(path).tensor("model.layers.0.mlp.down_proj.weight")
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, stored), stored)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.reshape(values.shape))


def test_six_bit_blocks_are_read(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    _, block_bytes = gguf.GGML_QUANT_SIZES[Type.Q6_K]
    blocks = random.integers(0, 100, (4, block_bytes), dtype=np.uint8)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=Type.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufFile(path).tensor("model.embed_tokens.weight")
    np.testing.assert_array_equal(found, gguf.quants.dequantize(blocks, Type.Q6_K))


@pytest.mark.parametrize("stored", [Type.F32, Type.Q8_0], ids=lambda kind: kind.name)
def test_llama_query_and_key_rows_come_in_hugging_face_order(tmp_path: Path, stored: Type) -> None:
    wanted = llama_tensors()
    heads = {"blk.1.attn_q.weight": HEADS, "blk.1.attn_k.weight": KV_HEADS}
    tensors = wanted | {name: llama_cpp_order(wanted[name], count) for name, count in heads.items()}
    path = write_gguf(tmp_path / "m.gguf", shape_metadata(), tensors, stored=dict.fromkeys(heads, stored))
    file = GgufFile(path)
    for name, theirs in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        expected = gguf.quants.dequantize(gguf.quants.quantize(wanted[f"blk.1.{theirs}.weight"], stored), stored)
        np.testing.assert_array_equal(file.tensor(f"model.layers.1.self_attn.{name}.weight"), expected)
        raw = file.raw(f"model.layers.1.self_attn.{name}.weight")
        assert raw.type is stored
        np.testing.assert_array_equal(raw.dequantised(), expected)


def test_llama_query_bias_follows_its_rows(tmp_path: Path) -> None:
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    tensors = {"blk.0.attn_q.bias": llama_cpp_order(bias, HEADS)}
    file = GgufFile(write_gguf(tmp_path / "m.gguf", shape_metadata(), tensors))
    np.testing.assert_array_equal(file.tensor("model.layers.0.self_attn.q_proj.bias"), bias)


def test_qwen_query_rows_are_stored_as_they_are(tmp_path: Path) -> None:
    tensors = llama_tensors()
    path = write_gguf(tmp_path / "m.gguf", shape_metadata("qwen2"), tensors, architecture="qwen2")
    found = GgufFile(path).tensor("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_array_equal(found, tensors["blk.0.attn_q.weight"])


def test_every_tensor_is_given_once_under_its_hugging_face_name(tmp_path: Path) -> None:
    import torch
    import transformers

    file = GgufFile(tiny_llama_gguf(tmp_path / "m.gguf"))
    config = transformers.LlamaConfig(
        vocab_size=file.tensor("model.embed_tokens.weight").shape[0],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        expected = transformers.LlamaForCausalLM(config).state_dict()
    del expected["lm_head.weight"]
    found = [(name, tuple(values.shape)) for name, values in file.tensors()]
    assert sorted(found) == sorted((name, tuple(values.shape)) for name, values in expected.items())
    assert file.unmapped_names == ()


def test_metadata_holds_scalars_strings_and_lists(tmp_path: Path) -> None:
    entries = {
        "a.flag": True,
        "a.count": 7,
        "a.text": "µ",
        "a.words": ["x", "yß"],
        "a.numbers": [1, -2, 3],
        "a.real": 0.5,
    }
    file = GgufFile(write_gguf(tmp_path / "m.gguf", entries, {}))
    assert {key: file.metadata[key] for key in entries} == entries


def test_rope_factors_are_read_and_are_no_weight(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    file = GgufFile(write_gguf(tmp_path / "m.gguf", shape_metadata(), {"rope_freqs.weight": factors}))
    assert file.rope_factors() == tuple(factors.tolist())
    assert file.tensor_names == ()


def test_a_file_cut_inside_its_tensors_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tiny_llama_gguf(tmp_path / "m.gguf")
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(ModelError, match=rf"truncated: it has {whole - 100_000} bytes of \d+"):
        GgufFile(path)


@pytest.mark.parametrize("kept", [5, 20, 100, 3000])
def test_a_file_cut_inside_its_header_is_refused(tmp_path: Path, kept: int) -> None:
    path = tiny_llama_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match="damaged or truncated inside its header"):
        GgufFile(path)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match="not a GGUF file"):
        GgufFile(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="cannot read"):
        GgufFile(path)
    with pytest.raises(ModelError, match="cannot read"):
        GgufFile(tmp_path / "absent.gguf")


def test_a_storage_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("output.weight", np.zeros((1, 32), np.int8), raw_dtype=Type.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"output\.weight is stored as I8"):
        GgufFile(path).tensor("lm_head.weight")
