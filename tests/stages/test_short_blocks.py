"""A stage that reads shorter sequences than the others: the same text in the same order, counted right."""

import torch

from distill.convert_stage import convert_stage
from distill.run import at_work_on, open_run
from stages import hidden
from tests.stages.run_folder import metrics

SHORT = ("device=cpu", "stages.hidden.block=8", "stages.hidden.batch_size=16")


def test_a_stages_text_depends_on_neither_its_blocks_nor_the_other_stages(recipe):
    runs = [open_run(recipe, changes) for changes in ([], SHORT, ["stages.mixing=null", "stages.logits=null"])]
    for step in (0, 7):
        whole, short, alone = (
            run.training_batches("hidden", size).batch(step) for run, size in zip(runs, (4, 16, 4), strict=True)
        )
        assert short["input_ids"].shape == (16, 8)
        assert torch.equal(short["input_ids"].flatten(), whole["input_ids"].flatten())
        assert int((short["position_ids"] == 0).sum()) >= 16  # no block sees the one before it
        assert torch.equal(alone["input_ids"], whole["input_ids"])
        others = runs[0].training_batches("logits", 4).batch(step)["input_ids"]
        assert not torch.equal(others, whole["input_ids"])


def test_a_stage_with_short_blocks_counts_tokens_and_steps(recipe):
    changes = [*SHORT, "stages.mixing=null", "stages.hidden.tokens=600", "stages.hidden.eval_every=3"]
    with at_work_on(recipe, changes) as run:
        convert_stage(run)
        record = hidden.main(run)
        assert (record.steps, record.tokens) == (600 // 128, 600 // 128 * 128)
        rows = metrics(run.folder("hidden"))
        assert [row["tokens"] for row in rows if row["kind"] == "train"] == [128, 256, 384, 512]
        assert record.loss_end < record.loss_start
        assert run.is_done("hidden")


def test_a_cache_of_the_teacher_knows_the_blocks_it_was_made_of(recipe):
    from distill.teacher_cache.offline import teacher_cache

    offline = "stages.logits.offline_teacher={top_k: 4}"
    whole = teacher_cache(open_run(recipe, [offline]))
    short = teacher_cache(open_run(recipe, [offline, "stages.logits.block=8", "stages.logits.batch_size=16"]))
    assert (whole.identity.block, short.identity.block) == (32, 8)
    assert short.tokens == whole.tokens == 3072
    assert short.order.tolist() == [4 * block + part for block in whole.order.tolist() for part in range(4)]
