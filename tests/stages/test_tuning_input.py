"""Bad input to the tuning programs: exit code 2, one screen of what to do, nothing written, nothing lost."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill import convert
from distill.adapters import default_lora_targets
from tests.stages.program import require_refused, run

peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra brings it)")
pytest.importorskip("trl", reason="trl is not installed (the dev extra brings it)")

pytestmark = pytest.mark.slow  # processes; one test, since they share their files

MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
UNMARKED = "{% for m in messages %}{{ m.content }}{% endfor %}"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_program_refuses_what_it_cannot_use(stories_teacher, tmp_path):
    student, adapter = tmp_path / "student", tmp_path / "adapter"
    torch.manual_seed(0)
    convert(stories_teacher, keep_attention=[1]).save_pretrained(student)
    AutoTokenizer.from_pretrained(stories_teacher).save_pretrained(student)
    teacher = AutoModelForCausalLM.from_pretrained(stories_teacher)
    config = peft.LoraConfig(r=2, target_modules=default_lora_targets(teacher), task_type="CAUSAL_LM")
    peft.get_peft_model(teacher, config).save_pretrained(adapter)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = {
        "chats": {"messages": turns},
        "nobody": {"messages": [{"content": "Hi"}, {"content": "Hello"}]},
        "equal": {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"},
        "prompts": {"prompt": "Hi"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "tuning.yaml"
    recipe.write_text(f"run_dir: {tmp_path}/run\nmodel: {student}\ndata: {{source: {tmp_path}/chats.jsonl}}\n")
    short = {"finetune": "data.max_length=64", "prefer": "data.max_length=64", "onpolicy": "data.max_prompt=64"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)

    def refused(stage: str, *overrides: str, said: str) -> None:
        require_refused(run(f"stages.{stage}", recipe, short[stage], *overrides), said)
        assert snapshot(tmp_path) == before

    templates = [f"data.chat_template={json.dumps(template)}" for template in (MARKED, UNMARKED)]
    refused("finetune", templates[0], f"adapter.start={adapter}", said="is for another model than")
    refused("finetune", templates[0], f"data.source={tmp_path}/nobody.jsonl", said="every message needs a role")
    refused("finetune", templates[1], said="the chat template has no assistant marker")
    equal = f"data.source={tmp_path}/equal.jsonl"
    refused("prefer", "reference=start", equal, said="equal.jsonl:1: chosen and rejected are equal")
    prompts = f"data.source={tmp_path}/prompts.jsonl"
    refused("onpolicy", prompts, f"teacher.path={adapter}", said="training.batch_size: a step takes 16 prompts")
    one = "training.batch_size=1"
    refused("onpolicy", prompts, one, f"teacher.path={adapter}", said="teacher.path:")
