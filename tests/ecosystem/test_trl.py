"""TRL's SFTTrainer on a student: its packed rows hold documents that do not see one another, and training goes down."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl is not installed (the dev extra brings it)")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.slow  # importing the trainer takes longer than all tests


def trainer(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stories: list[str], folder: Path, **more: Any
) -> SFTTrainer:
    settings = SFTConfig(
        output_dir=str(folder),
        packing=True,
        packing_strategy="bfd",
        max_length=128,
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=2e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=student,
        args=settings,
        train_dataset=Dataset.from_dict({"text": stories}),
        processing_class=tokenizer,
        **more,
    )


def losses(trained: SFTTrainer) -> list[float]:
    return [float(entry["loss"]) for entry in trained.state.log_history if "loss" in entry]


def test_packed_documents_of_the_trainer_do_not_leak(student, tokenizer, stories, tmp_path):
    made = trainer(student, tokenizer, [text[: 90 + 7 * n] for n, text in enumerate(stories)], tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    starts = batch["position_ids"][0].eq(0).nonzero()[:, 0].tolist()
    assert len(starts) > 2, "several documents a row is what this is about"
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        together = made.model.train()(**inputs, use_cache=False).logits
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            alone = student(batch["input_ids"][:1, start:end], use_cache=False).logits
            torch.testing.assert_close(together[:1, start:end], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_trainer_trains_a_student(student, tokenizer, stories, tmp_path, adapted):
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    lora = {"peft_config": LoraConfig(r=4, target_modules=["in_proj", "out_proj", "q_proj", "v_proj"])}
    made = trainer(student, tokenizer, stories, tmp_path, **(lora if adapted else {}))
    made.train()
    assert min(losses(made)[-3:]) < losses(made)[0]
    if not adapted:
        moved = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == before.keys()
        return
    merged = made.model.merge_and_unload()
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.rsplit(".", 2)[-2] for name in changed} == {"in_proj", "out_proj", "q_proj", "v_proj"}
