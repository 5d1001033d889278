"""Rows of single weights from a Hugging Face folder: of one file or several, whatever the names begin with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import UserError
from distill.stored_weights import StoredWeights
from distill.weight_files import shards_of
from distill.weight_names import names_in
from tests.conftest import tiny
from tests.distill.families.models import tiny as tiny_family

WEIGHTS = {
    "model.layers.0.mlp.weight": torch.arange(12.0).view(4, 3),
    "model.layers.0.norm.weight": torch.arange(3.0, dtype=torch.bfloat16),
    "model.embed_tokens.weight": torch.arange(10.0).view(5, 2),
    "lm_head.bias": torch.tensor([7.0]),
}


def save(folder: Path, weights: dict[str, Tensor], files: int = 1) -> StoredWeights:
    folder.mkdir()
    if files == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        weight_map = {name: f"model-{index % files + 1}.safetensors" for index, name in enumerate(weights)}
        for file in set(weight_map.values()):
            save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return StoredWeights(folder, "model")


@pytest.mark.parametrize("files", [1, 3])
def test_any_rows_in_the_dtype_of_the_file(tmp_path, files):
    stored = save(tmp_path / "model", WEIGHTS, files)
    for name, weight in WEIGHTS.items():
        for rows in (slice(None), slice(0, 1), slice(1, 3), slice(len(weight), len(weight))):
            got = stored.rows([name], tuple(weight.shape), rows)
            assert got.dtype == weight.dtype
            assert torch.equal(got, weight[rows])


def test_a_checkpoint_of_the_bare_decoder_lacks_the_prefix(tmp_path):
    bare = {name.removeprefix("model."): weight for name, weight in WEIGHTS.items()}
    stored = save(tmp_path / "model", bare)
    assert torch.equal(stored.rows(["model.embed_tokens.weight"], (5, 2), slice(2, 4)), torch.arange(4.0, 8).view(2, 2))


def test_of_tied_names_the_file_has_one_at_least(tmp_path):
    stored = save(tmp_path / "model", WEIGHTS)
    for names in (["lm_head.weight", "model.embed_tokens.weight"], ["model.embed_tokens.weight", "lm_head.weight"]):
        assert torch.equal(stored.rows(names, (5, 2), slice(None)), WEIGHTS["model.embed_tokens.weight"])


def test_what_is_lacking_or_of_another_shape_is_named(tmp_path):
    stored = save(tmp_path / "model", WEIGHTS)
    with pytest.raises(UserError, match=r"model lacks weights of its model: model\.layers\.9\.mlp\.weight"):
        stored.rows(["model.layers.9.mlp.weight", "other"], (4, 3), slice(None))
    with pytest.raises(UserError, match=r"has model\.layers\.0\.mlp\.weight in shape \[4, 3\], not \[4, 4\]"):
        stored.rows(["model.layers.0.mlp.weight"], (4, 4), slice(None))


def test_a_real_folder_has_every_weight_of_its_model(tmp_path, family):
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(shards_of(tmp_path)) > 1
    stored = StoredWeights(tmp_path, model.base_model_prefix)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for parameter in model.parameters():
        assert torch.equal(stored.rows(names[id(parameter)], tuple(parameter.shape), slice(None)), parameter)


def test_the_files_of_a_folder(tmp_path):
    save(tmp_path / "one", WEIGHTS)
    assert shards_of(tmp_path / "one") == [tmp_path / "one/model.safetensors"]
    save(tmp_path / "several", WEIGHTS, 3)
    shards = [tmp_path / f"several/model-{number}.safetensors" for number in (1, 2, 3)]
    assert shards_of(tmp_path / "several") == shards
    assert {name for shard in shards for name in load_file(shard)} == WEIGHTS.keys()
    # A file beside them that the index does not name is none of them; a whole one comes before any index.
    save_file({"stray": torch.ones(1)}, tmp_path / "several/model-9.safetensors")
    assert shards_of(tmp_path / "several") == shards
    save_file({"whole": torch.ones(1)}, tmp_path / "several/model.safetensors")
    assert shards_of(tmp_path / "several") == [tmp_path / "several/model.safetensors"]


def test_missing_files_are_named(tmp_path):
    save(tmp_path / "several", WEIGHTS, 4)
    for number in (1, 3):
        (tmp_path / f"several/model-{number}.safetensors").unlink()
    said = r"lacks 2 of 4 shards: model-1\.safetensors, model-3\.safetensors; download them again"
    with pytest.raises(UserError, match=said):
        shards_of(tmp_path / "several")
    with pytest.raises(UserError, match=said):
        StoredWeights(tmp_path / "several", "model").rows(["lm_head.bias"], (1,), slice(None))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no weights"):
        shards_of(tmp_path / "empty")


@pytest.mark.parametrize("case", ["Mixtral", "Qwen3-MoE"])
def test_experts_that_are_stored_apart_are_read_as_one(case, tmp_path):
    model = tiny_family(case)
    model.save_pretrained(tmp_path)
    assert any(".experts.1." in name for name in load_file(tmp_path / "model.safetensors"))
    stored = StoredWeights(tmp_path, model.base_model_prefix, names_in(model))
    for name, parameter in model.named_parameters():
        for rows in (slice(None), slice(1, 3), slice(len(parameter), len(parameter))):
            assert torch.equal(stored.rows([name], tuple(parameter.shape), rows), parameter[rows])


def test_an_expert_that_is_lacking_is_noticed(tmp_path):
    model = tiny_family("Mixtral")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    stored = StoredWeights(tmp_path, model.base_model_prefix, names_in(model))
    with pytest.raises(UserError, match=r"experts\.gate_up_proj in shape"):
        stored.rows(["model.layers.0.mlp.experts.gate_up_proj"], (4, 96, 32), slice(None))
