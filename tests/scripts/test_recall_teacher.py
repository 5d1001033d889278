"""The batches that the recall teacher is trained on, and that its training loss is of the answers alone."""

import numpy as np
import pytest
import torch

from distill.data.blocks import IGNORED
from scripts.recall_teacher import LONG, LONGEST, drawn, padded
from scripts.teacher_training import new_llama, shifted_loss
from scripts.train_teacher import main, program, recall

VOCABULARY = 320


@torch.no_grad()
def test_what_is_learned_is_every_answer_and_nothing_else():
    rows = list(drawn(LONG, 12, VOCABULARY, np.random.default_rng(0)))
    batch = padded(iter(rows))
    torch.manual_seed(0)
    model = new_llama(VOCABULARY, 16, 2, 2, 1, 32, positions=LONGEST)
    logs, count = 0.0, 0
    for row in rows:
        logits_TV = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for ask in row.asks:
            logs += sum(float(logits_TV[ask.at + i, token]) for i, token in enumerate(ask.answer))
            count += len(ask.answer)
    loss, scored = shifted_loss(model, batch)
    assert scored == count == int((batch["labels"] != IGNORED).sum())
    assert float(loss) == pytest.approx(-logs, rel=1e-5)


def test_the_task_chooses_the_program():
    assert program(["--tokens", "5"]) == (main, ["--tokens", "5"])
    assert program(["--steps", "5", "--task", "recall", "--seed", "1"]) == (recall, ["--steps", "5", "--seed", "1"])
    with pytest.raises(SystemExit) as end:
        program(["--task", "recal"])
    assert end.value.code == 2
