"""A recipe's task asked of a model: the very numbers of ``examine``, and mistakes before anything is trained."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.errors import UserError
from distill.recall import examine, row_examples
from distill.recall.asked import examples_of, recall_measure
from distill.recipe_evaluation import RecallTask
from tests.conftest import SHAPE


def test_means_over_the_cells_under_the_tasks_name():
    task = RecallTask(task="copying", name="stretch", surface="ids", items=(2, 3), samples=5, seed=4, every=1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 320})).eval()
    found = recall_measure(task, examples_of(task, None, 320))(model, 7)
    assert list(found) == ["recall.stretch.written", "recall.stretch.chosen", "recall.stretch.log_probability"]
    results = [
        result
        for items in (2, 3)
        for result in examine(model, row_examples("copying", items, 0, samples=5, seed=4, vocabulary=320))
    ]
    assert found["recall.stretch.chosen"] == pytest.approx(sum(one.rank == 1 for one in results) / 10)
    assert found["recall.stretch.written"] == pytest.approx(sum(one.written for one in results) / 10)
    mean = sum(one.log_probability for one in results) / 10
    assert found["recall.stretch.log_probability"] == pytest.approx(mean, rel=1e-4)


def test_a_length_that_holds_nothing_is_told_at_once():
    task = RecallTask(task="phonebook", surface="ids", items=(30,), lengths=(20,), every=1)
    with pytest.raises(UserError, match="the length is 20"):
        examples_of(task, None, 97)
