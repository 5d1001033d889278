"""Pairs and recipes of preference tuning: what is refused before a weight is loaded, and what is left out."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill.errors import UserError
from distill.finetuning.job import Job, at_work_on_tuning, open_job
from distill.finetuning.preferences import encoded_pair, fitting_pairs, load_prefer_recipe
from tests.distill.finetuning.conftest import chat, pair

pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")
pytest.importorskip("trl", reason="trl is not installed (the dev extra brings it)")

GOOD = pair("Once upon a time", "there was a cat.", "cat a was there.")


def refused(recipe: Path, *overrides: str) -> str:
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(UserError) as caught, at_work_on_tuning(recipe, overrides, load_prefer_recipe):
        pass
    assert sorted(recipe.parent.rglob("*")) == before
    return str(caught.value)


def opened(recipe: Path, *overrides: str) -> Job:
    return open_job(load_prefer_recipe(recipe, overrides))


def test_a_good_recipe_passes(prefer):
    job = opened(prefer)
    assert (len(job.rows), job.remarks, job.folder.name) == (60, (), "prefer")
    assert opened(prefer, "beta=0.2").fingerprint != job.fingerprint
    assert opened(prefer, "training.checkpoint_every=1").fingerprint == job.fingerprint


def test_defaults(prefer):
    """Those of MambaInLlama."""
    text = prefer.read_text().replace("beta: 0.1\n", "").replace("lr: 3.0e-3, ", "")
    prefer.write_text(text)
    recipe = load_prefer_recipe(prefer)
    assert (recipe.beta, recipe.loss) == (0.01, "sigmoid")
    assert (recipe.lr, load_prefer_recipe(prefer, ["method=full"]).lr) == (5e-6, 5e-7)


def test_the_reference_must_be_given(prefer):
    prefer.write_text(prefer.read_text().replace("reference: start\n", ""))
    assert "reference" in refused(prefer)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (pair("Hi", "Hello", "Hello"), "pairs.jsonl:2: chosen and rejected are equal"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}, "pairs.jsonl:2: chosen and rejected are equal"),
        (pair("Hi", "Hello", " "), "pairs.jsonl:2: rejected is empty"),
        ({"prompt": "Hi", "chosen": "", "rejected": "No"}, "pairs.jsonl:2: chosen is empty"),
        ({"prompt": "Hi", "chosen": [], "rejected": "No"}, "pairs.jsonl:2: chosen is no text and no list of messages"),
        ({"prompt": "Hi", "chosen": "Hello"}, "pairs.jsonl:2: no key 'rejected'; the keys are prompt, chosen"),
        ([], "no key 'prompt', 'chosen', 'rejected'; the keys are (none)"),
        (GOOD | {"prompt": "Hi"}, "prompt is text, chosen is messages, rejected is messages; give all three in one"),
        (GOOD | {"chosen": [{"from": "gpt"}]}, "pairs.jsonl:2: chosen: message 0 has from; every message needs a role"),
        (GOOD | {"chosen": chat(("user", "Hi"))["messages"]}, "chosen is what the assistant answers"),
        (GOOD | {"prompt": GOOD["chosen"]}, "the prompt ends with the assistant, who is to answer it"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is plain text and"),
    ],
)
def test_rows_that_are_no_pairs(prefer, write_pairs, row, said):
    write_pairs(GOOD, row)
    assert said in refused(prefer)


def test_an_empty_dataset(prefer, write_pairs):
    write_pairs()
    assert "has no rows; give a dataset with at least one pair" in refused(prefer)


def test_templates(prefer):
    assert "the model's tokenizer has no chat template" in refused(prefer, "data.chat_template=null")
    template = prefer.parent / "template.jinja"
    template.write_text("{{ messages[0].content + 1 }}")
    assert "pairs.jsonl:1: the chat template does not render this pair" in refused(prefer)
    template.write_text("{{ messages[0].content }}")
    assert "pairs.jsonl:1: chosen and rejected are the same 0 tokens" in refused(prefer)


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda text: {}, "a.jsonl:1: the tokenizer does not encode this pair: 'input_ids'"),
        (lambda text: {"input_ids": [1]}, "so that nothing is preferred; leave the row out"),
    ],
)
def test_plain_text_is_not_blamed_on_a_template(encode, said):
    class Tokenizer:
        eos_token = "</s>"
        __call__ = staticmethod(encode)

    text = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    with pytest.raises(UserError) as caught:
        fitting_pairs([("a.jsonl:1", text)], Tokenizer(), 8)
    assert str(caught.value).endswith(said)


def test_long_pairs_are_left_out_and_counted(prefer, write_pairs):
    write_pairs(GOOD, pair("Once upon a time", "there was a cat." * 30, "No."), GOOD)
    job = opened(prefer)
    assert len(job.rows) == 2
    assert job.remarks == ("1 of 3 pairs are longer than data.max_length, and are left out",)
    assert "all 3 pairs are longer than 4 tokens" in refused(prefer, "data.max_length=4")


@pytest.mark.slow  # imports TRL
@pytest.mark.parametrize("plain", [True, False], ids=["text", "messages"])
def test_pairs_are_encoded_as_the_trainer_does(prefer, write_pairs, plain):
    """So that the ones counted as too long are the ones that it would have cut."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    row = {"prompt": "Once upon", "chosen": " a time", "rejected": " no"} if plain else GOOD
    write_pairs(row)
    job = opened(prefer)
    from datasets import Dataset
    from trl import DPOConfig

    prepare = trainer.DPOTrainer._prepare_dataset
    owner = type("Owner", (), {"_tokenizer": job.tokenizer})()
    (made,) = prepare(owner, Dataset.from_list(job.rows), job.tokenizer, DPOConfig(use_cpu=True, bf16=False), "train")
    ours = encoded_pair(job.tokenizer, job.rows[0])
    assert (ours.prompt, ours.chosen, ours.rejected) == (made["prompt_ids"], made["chosen_ids"], made["rejected_ids"])


def test_references(prefer, student, tmp_path, stories_teacher):
    assert "reference:" in refused(prefer, f"reference={tmp_path}")
    teacher = opened(prefer, f"reference={stories_teacher}")
    assert teacher.fingerprint != opened(prefer).fingerprint
    other = tmp_path / "other"
    shutil.copytree(student, other)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    assert f"reference: {other} has another tokenizer than {student}" in refused(prefer, f"reference={other}")
    config = other / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 512', '"vocab_size": 640'))
    assert "predicts 640 tokens" in refused(prefer, f"reference={other}")


def test_a_start_in_four_bits_that_goes_on(prefer):
    assert "of which no copy is made" in refused(prefer, "method=qlora", "adapter.start=somewhere")


def test_dropout_is_refused(prefer):
    assert "adapter.dropout must be 0 here" in refused(prefer, "adapter.dropout=0.1")
