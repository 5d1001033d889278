"""The recall teacher: its batches, what its loss is of, and that the one in the repository recalls."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.data.blocks import IGNORED
from distill.recall import examine, row_examples
from scripts.recall_rows import LONG, LONGEST, VOCABULARY, drawn, write_text
from scripts.recall_teacher import padded
from scripts.teacher_training import new_llama, shifted_loss
from scripts.train_teacher import main, program, recall
from tests.conftest import CHECKOUT

SMALL = 320


@torch.no_grad()
def test_what_is_learned_is_every_answer_and_nothing_else():
    rows = list(drawn(LONG, 12, SMALL, np.random.default_rng(0)))
    batch = padded(iter(rows), answers_alone=True)
    torch.manual_seed(0)
    model = new_llama(SMALL, 16, 2, 2, 1, 32, positions=LONGEST)
    logs, count = 0.0, 0
    for row in rows:
        logits_TV = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for ask in row.asks:
            logs += sum(float(logits_TV[ask.at + i, token]) for i, token in enumerate(ask.answer))
            count += len(ask.answer)
    loss, scored = shifted_loss(model, batch)
    assert scored == count == int((batch["labels"] != IGNORED).sum())
    assert float(loss) == pytest.approx(-logs, rel=1e-5)


def test_in_the_end_every_token_is_learned_and_the_answers_stand_where_they_are_due():
    rows = list(drawn(LONG, 12, SMALL, np.random.default_rng(0)))
    batch = padded(iter(rows), answers_alone=False)
    due = padded(iter(rows), answers_alone=True)["labels"]
    for row, ids_T, labels_T, due_T in zip(rows, batch["input_ids"], batch["labels"], due, strict=True):
        answered = torch.tensor(row.answered())
        length = len(answered)
        assert torch.equal(ids_T[:length], answered)
        assert torch.equal(labels_T[:length], answered)
        assert bool((labels_T[length:] == IGNORED).all())
        asked_T = due_T[:length] != IGNORED
        assert torch.equal(answered[asked_T], due_T[:length][asked_T])
        others_T = ~asked_T[: len(row.ids)]
        assert torch.equal(answered[: len(row.ids)][others_T], torch.tensor(row.ids)[others_T])


def test_the_task_chooses_the_program():
    assert program(["--tokens", "5"]) == (main, ["--tokens", "5"])
    assert program(["--steps", "5", "--task", "recall", "--seed", "1"]) == (recall, ["--steps", "5", "--seed", "1"])
    with pytest.raises(SystemExit) as end:
        program(["--task", "recal"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("task", "cells"), [("associative", [(8, 64), (32, 128)]), ("phonebook", [(6, 0), (6, 128), (18, 0)])]
)
def test_the_teacher_in_the_repository_recalls(task, cells):
    teacher = AutoModelForCausalLM.from_pretrained(CHECKOUT / "teachers" / "recall")
    made = [row_examples(task, *cell, samples=128, seed=7, vocabulary=VOCABULARY) for cell in cells]
    results = [result for examples in made for result in examine(teacher, examples, batch_size=64)]
    assert sum(result.written for result in results) >= 0.99 * len(results)


def test_the_teacher_in_the_repository_is_small_and_reads_its_rows(tmp_path):
    folder = CHECKOUT / "teachers" / "recall"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    write_text(tmp_path / "rows.txt", 3, VOCABULARY, seed=0)
    again = tmp_path / "again.txt"
    write_text(again, 3, VOCABULARY, seed=0)
    assert again.read_text() == (tmp_path / "rows.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in again.read_text().splitlines():
        assert tokenizer(row)["input_ids"] == [int(word) for word in row.split()]
