"""What is refused before a weight is loaded: chats, templates, adapters and models that do not fit."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill import handover
from distill.adapters import default_lora_targets
from distill.errors import UserError
from distill.finetuning.bases import parent_of_tuning
from distill.finetuning.job import at_work_on_tuning, open_job
from distill.finetuning.recipe import load_finetune_recipe
from distill.handover import Parent, StageRecord
from tests.distill.finetuning.conftest import TEMPLATE, chat

peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")
pytest.importorskip("trl", reason="trl is not installed (the dev extra brings it)")


def refused(recipe: Path, *overrides: str) -> str:
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(UserError) as caught, at_work_on_tuning(recipe, overrides):
        pass
    assert sorted(recipe.parent.rglob("*")) == before
    return str(caught.value)


def test_a_good_recipe_passes(recipe):
    job = open_job(load_finetune_recipe(recipe))
    assert len(job.rows) == 60
    assert job.tokenizer.chat_template == TEMPLATE
    assert not job.is_done()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"content": "Hello"}]}, "chats.jsonl:2: message 0 has content; every message needs a role and"),
        ({"messages": [{"from": "human", "value": "Hi"}]}, "message 0 has from, value; every message needs a role"),
        (chat(("human", "Hi")), "message 0 has the role 'human'; roles are system, user, assistant, tool"),
        (chat(("user", "Hi")), "chats.jsonl:2: no message is the assistant's"),
        (chat(("user", None)), "the content of message 0 is no text"),
        ({"text": "Hi"}, "chats.jsonl:2: no key 'messages'; the keys are text; set data.key"),
        ({"messages": "Hi"}, "holds no list of messages; for documents set data.format to text"),
        ({"messages": []}, "holds no list of messages"),
        ([], "no key 'messages'; the keys are (none)"),
    ],
)
def test_rows_that_are_no_chats(recipe, write_chats, row, said):
    write_chats(chat(("user", "Hi"), ("assistant", "Hello")), row)
    assert said in refused(recipe)


def test_a_row_without_the_assistant_may_be_read_whole(recipe, write_chats):
    write_chats(chat(("user", "Hi")))
    assert len(open_job(load_finetune_recipe(recipe, ["data.assistant_only=false"])).rows) == 1


def test_an_empty_dataset(recipe, write_chats):
    write_chats()
    assert "has no rows; give a dataset with at least one chat" in refused(recipe)


def test_a_broken_line(recipe):
    (recipe.parent / "chats.jsonl").write_text('{"messages"\n')
    assert "chats.jsonl:1: is not JSON" in refused(recipe)


def test_no_such_dataset(recipe):
    assert "no such file; give .jsonl or .parquet, or dataset:org/name" in refused(recipe, "data.source=nothing.jsonl")


def test_parquet_holds_the_same_rows(recipe):
    from datasets import Dataset

    job = open_job(load_finetune_recipe(recipe))
    Dataset.from_list(job.rows).to_parquet(recipe.parent / "chats.parquet")
    again = open_job(load_finetune_recipe(recipe, [f"data.source={recipe.parent / 'chats.parquet'}"]))
    assert (again.rows, again.fingerprint) == (job.rows, job.fingerprint)


def test_a_template_without_an_assistant_marker(recipe):
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (recipe.parent / "template.jinja").write_text(plain)
    assert "the chat template has no assistant marker" in refused(recipe)
    open_job(load_finetune_recipe(recipe, ["data.assistant_only=false"]))


def test_a_marker_around_nothing(recipe):
    (recipe.parent / "template.jinja").write_text("{% generation %}{% endgeneration %}{{ messages[0].content }}")
    assert "marks no token of the first row as the assistant's" in refused(recipe)


def test_a_template_that_does_not_render(recipe):
    (recipe.parent / "template.jinja").write_text("{% generation %}{{ messages[0].content + 1 }}{% endgeneration %}")
    assert "the chat template does not render the first row" in refused(recipe)


def test_no_template(recipe):
    assert "the model's tokenizer has no chat template" in refused(recipe, "data.chat_template=null")


def test_a_file_of_a_template_that_is_not_there(recipe):
    assert "data.chat_template 'nothing.jinja' cannot be read" in refused(recipe, "data.chat_template=nothing.jinja")


def test_more_tokens_than_positions(recipe):
    assert "data.max_length: 100000 tokens are more than the" in refused(recipe, "data.max_length=100000")


def test_no_model(recipe):
    assert "is no model's folder (it has no config.json)" in refused(recipe, f"model={recipe.parent}")


def test_four_bits_without_their_package(recipe, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    assert "by bitsandbytes, which is not installed: pip install" in refused(recipe, "method=qlora")


def test_several_processes(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "fine-tuning runs as one process" in refused(recipe)


@pytest.fixture
def adapter(student, tmp_path) -> Path:
    """An adapter as plain PEFT saves one."""
    base = AutoModelForCausalLM.from_pretrained(student)
    config = peft.LoraConfig(r=2, target_modules=default_lora_targets(base), task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def ours(adapter: Path, parent: Parent | None) -> Path:
    """The same as a finished stage."""
    record = StageRecord("finetune", parent, 1.0, 1.0, 1, 1, 1.0)
    folder = adapter.with_name("ours")
    handover.write(folder, lambda partial: shutil.copytree(adapter, partial, dirs_exist_ok=True), record)
    return folder


def test_an_adapter_to_go_on_with(recipe, adapter, student):
    job = open_job(load_finetune_recipe(recipe, [f"adapter.start={adapter}"]))
    assert job.fingerprint != open_job(load_finetune_recipe(recipe)).fingerprint
    open_job(load_finetune_recipe(recipe, [f"adapter.start={ours(adapter, parent_of_tuning(student))}"]))


def test_the_scale_of_an_adapter_to_go_on_with_is_part_of_the_job(recipe, adapter):
    """It stands beside the weights, in the adapter's config."""
    start = f"adapter.start={adapter}"
    before = open_job(load_finetune_recipe(recipe, [start])).fingerprint
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    assert open_job(load_finetune_recipe(recipe, [start])).fingerprint != before


def test_an_adapter_for_other_weights(recipe, adapter):
    said = refused(recipe, f"adapter.start={ours(adapter, Parent('logits', 'ab' * 32))}")
    assert "is an adapter for logits (abababababab)" in said
    assert "give the model it was trained on" in said


def test_an_adapter_for_other_shapes(recipe, adapter):
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("in_proj.lora_A.weight"))
    save_file(tensors | {name: torch.zeros(2, 999)}, adapter / "adapter_model.safetensors")
    assert "is for another model than" in refused(recipe, f"adapter.start={adapter}")


def test_an_adapter_for_other_layers(recipe, adapter, stories_teacher, tmp_path):
    """The student's adapters reach mixers, which its teacher has none of."""
    said = refused(recipe, f"adapter.start={adapter}", f"model={stories_teacher}")
    assert "is for another model than" in said
    assert "in_proj is not there" in said


def test_an_adapter_of_another_method(recipe, adapter):
    assert "is of another method than dora" in refused(recipe, f"adapter.start={adapter}", "method=dora")


def test_no_adapter(recipe, adapter, student):
    assert "holds no adapter" in refused(recipe, f"adapter.start={student}")
    (adapter / "adapter_config.json").write_text("{")
    assert "holds no adapter" in refused(recipe, f"adapter.start={adapter}")


def test_an_adapter_as_model(recipe, adapter):
    assert "holds an adapter; give the model it is for" in refused(recipe, f"model={adapter}")


def test_damaged_weights_of_a_stage(recipe, student, tmp_path):
    record = StageRecord("logits", None, 1.0, 1.0, 1, 1, 1.0)
    stage = tmp_path / "stage"
    handover.write(stage, lambda partial: shutil.copytree(student, partial, dirs_exist_ok=True), record)
    assert open_job(load_finetune_recipe(recipe, [f"model={stage}"])).parent.stage == "logits"
    config = json.loads((stage / "config.json").read_text())
    (stage / "config.json").write_text(json.dumps(config, indent=3))
    assert "config.json" in refused(recipe, f"model={stage}")


def test_somebody_elses_folder(recipe):
    (recipe.parent / "run" / "finetune").mkdir(parents=True)
    (recipe.parent / "run" / "finetune" / "thesis.txt").write_text("years of work")
    assert "holds no stage.json, so it is not a finished stage and is not replaced" in refused(recipe)
