"""Weights that are missing, foreign, mis-shaped or cut off are refused with a message that names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_support import FAMILIES, make_model

from bascule.engine.torch.weights import expected_shapes, load_weights
from bascule.errors import ModelError
from bascule.models.hf_directory import ModelDirectory
from bascule.models.source import ModelSource, SourceKind

Tensors = dict[str, torch.Tensor]


def source_of(directory: Path) -> ModelSource:
    """The files of `directory` as they are, without the checks that `resolve` makes first."""
    return ModelSource("tiny", SourceKind.SAFETENSORS, directory, tuple(sorted(directory.glob("*.safetensors"))))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Tensors:
    return load_weights(ModelDirectory(directory).spec(), source_of(directory), dtype)


def rewrite(directory: Path, change: Callable[[Tensors], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_arrives_in_the_dtype_served(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_model(family, tmp_path)
    stored, loaded = load_file(tmp_path / "model.safetensors"), load(tmp_path, dtype)
    assert loaded.keys() == stored.keys() == expected_shapes(ModelDirectory(tmp_path).spec()).keys()
    assert all(torch.equal(loaded[name], stored[name].to(dtype)) for name in stored)


def test_several_files_are_read_as_one_model(tmp_path: Path) -> None:
    make_model("qwen3-wide-heads", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(whole)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: whole[name] for name in part}, tmp_path / f"model-{number}.safetensors")
    assert load(tmp_path).keys() == whole.keys()


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    make_model("llama3-untied", tmp_path)
    rewrite(tmp_path, lambda tensors: [tensors.pop(f"model.layers.{n}.mlp.up_proj.weight") for n in range(3)])
    with pytest.raises(ModelError, match=r"lacks tensors of a LlamaForCausalLM: model\.layers\.0\.mlp\.up_proj"):
        load(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    make_model("llama3-untied", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(130, 48)}))
    with pytest.raises(ModelError, match=r"lm_head\.weight has the shape \[130, 48\].*\[131, 48\]"):
        load(tmp_path)


def test_a_tensor_that_the_decoder_would_drop_is_refused(tmp_path: Path) -> None:
    make_model("llama3-untied", tmp_path)
    name = "model.layers.1.self_attn.q_proj.bias"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(48)}))
    with pytest.raises(ModelError, match=r"holds tensors that no LlamaForCausalLM has: model\.layers\.1.*q_proj\.bias"):
        load(tmp_path)


def test_tensors_that_follow_from_others_are_passed_over(tmp_path: Path) -> None:
    make_model("qwen2-tied", tmp_path)
    extra = {"lm_head.weight": torch.zeros(131, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewrite(tmp_path, lambda tensors: tensors.update(extra))
    assert not extra.keys() & load(tmp_path).keys()


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    make_model("qwen2-tied", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds torch\.int8"):
        load(tmp_path)


def test_a_file_that_is_cut_off_or_gone_is_named(tmp_path: Path) -> None:
    make_model("qwen2-tied", tmp_path)
    path = tmp_path / "model.safetensors"
    source, spec = source_of(tmp_path), ModelDirectory(tmp_path).spec()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"cannot read the weights in .*model\.safetensors"):
        load_weights(spec, source, torch.float32)
    path.unlink()
    with pytest.raises(ModelError, match=r"cannot read the weights in .*model\.safetensors"):
        load_weights(spec, source, torch.float32)
