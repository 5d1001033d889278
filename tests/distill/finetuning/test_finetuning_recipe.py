"""A fine-tuning recipe: its defaults, what it refuses, and what its digest is blind to."""

from pathlib import Path

import pytest

from distill.errors import UserError
from distill.finetuning.on_policy import load_on_policy_recipe
from distill.finetuning.preferences import load_prefer_recipe
from distill.finetuning.recipe import load_finetune_recipe
from tests.conftest import CHECKOUT

LOADERS = {"prefer": load_prefer_recipe, "onpolicy": load_on_policy_recipe}


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("model: m\ndata: {source: s.jsonl}\n")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_finetune_recipe(path, overrides)
    return str(caught.value)


def test_defaults(small):
    recipe = load_finetune_recipe(small)
    assert (recipe.name, recipe.run_dir, recipe.data.key) == ("small", Path("runs/small"), "messages")
    assert (recipe.lr, load_finetune_recipe(small, ["method=full"]).lr) == (2e-4, 2e-5)
    assert load_finetune_recipe(small, ["data.format=text"]).data.key == "text"


@pytest.mark.parametrize("path", sorted((CHECKOUT / "recipes" / "finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_dumps_to_itself(path, tmp_path):
    recipe = LOADERS.get(path.stem, load_finetune_recipe)(path)
    again = tmp_path / path.name
    again.write_text(recipe.dump())
    assert LOADERS.get(path.stem, load_finetune_recipe)(again) == recipe


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.step=3", "training.step: unknown key, did you mean 'steps'?"),
        ("method=dorra", "method: must be one of full, lora, rslora, dora, qlora, not 'dorra', did you mean 'dora'?"),
        ("training.micro_batch_size=3", "micro_batch_size: 3 must divide batch_size, 16"),
        ("data.separator=x", "separator is for format: text"),
        ("data={source: s, format: text, chat_template: t}", "chat_template is for format: chat"),
    ],
)
def test_mistakes(small, override, said):
    assert said in message(small, override)


def test_adapters_have_no_place_in_full(small):
    assert "adapter is for method: lora, rslora, dora or qlora" in message(small, "method=full", "adapter.rank=4")


def test_an_adapter_to_go_on_with_has_its_own_settings(small, tmp_path):
    """Also where they are those of a new one unless given; what is written out is read back."""
    assert "rank: of a new adapter, and adapter.start has its own" in message(small, "adapter={start: a, rank: 16}")
    said = message(small, "adapter={start: a, alpha: 2, dropout: 0.1}")
    assert "alpha, dropout: of a new adapter, and adapter.start has its own; leave out what is not meant" in said
    recipe = load_finetune_recipe(small, ["adapter={start: a, merge: true}"])
    (tmp_path / "again.yaml").write_text(recipe.dump())
    assert load_finetune_recipe(tmp_path / "again.yaml") == recipe


def test_four_bits_are_not_merged_into(small):
    assert "adapter.merge would round the sum to 4 bits again" in message(small, "method=qlora", "adapter.merge=true")


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("run_dir=elsewhere", False),
        ("training.micro_batch_size=8", False),
        ("training.checkpoint_every=1", False),
        ("data.source=moved.jsonl", False),
        ("training.batch_size=8", True),
        ("adapter.rank=4", True),
        ("dtype=bfloat16", True),
        ("seed=1", True),
        ("data.assistant_only=false", True),
    ],
)
def test_digest(small, override, changes):
    changed = load_finetune_recipe(small, [override]).digest() != load_finetune_recipe(small).digest()
    assert changed == changes
