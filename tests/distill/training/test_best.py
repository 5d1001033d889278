"""The checkpoint of the lowest KL (or loss) stays, however many come after it."""

import pytest
from tiny_run import ACCUMULATE, crash, run, saved, stop_at

from distill.training import Cadence


def kl_at(values: dict[int, float], metric: str = "kl"):
    """An evaluation that finds these values one after the other, and says at which step of the run it is."""
    left = iter(values.values())
    return lambda: {metric: next(left), "other": 0.0}


@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_the_best_checkpoint_is_kept(tmp_path, metric):
    """The lowest of all stands at step 10, of which there is no checkpoint."""
    found = {0: 0.1, 5: 7.0, 10: 0.2, 15: 6.0, 20: 8.0}
    cadence = Cadence(eval_every=5, checkpoint_every=15, keep_checkpoints=1)
    result = run(tmp_path, evaluate=kl_at(found, metric), cadence=cadence)
    assert (result.best_step, result.best) == (15, 6.0)
    assert saved(tmp_path) == ["step-00000015", "step-00000020"]


def test_the_best_checkpoint_outlives_those_between(tmp_path):
    found = {0: 9.0, 4: 3.0, 8: 1.0, 12: 5.0, 16: 2.0, 20: 4.0}
    cadence = Cadence(eval_every=4, checkpoint_every=4, keep_checkpoints=1)
    result = run(tmp_path, evaluate=kl_at(found), cadence=cadence)
    assert (result.best_step, result.best) == (8, 1.0)
    assert saved(tmp_path) == ["step-00000008", "step-00000020"]
    assert run(tmp_path, evaluate=kl_at({20: 4.0}), cadence=cadence) == result


def test_the_kl_counts_where_both_are_measured(tmp_path):
    kls = iter([9.0, 1.0, 2.0])
    losses = iter([9.0, 2.0, 1.0])
    cadence = Cadence(eval_every=10, checkpoint_every=10)
    result = run(tmp_path, evaluate=lambda: {"loss": next(losses), "kl": next(kls)}, cadence=cadence)
    assert (result.best_step, result.best) == (10, 1.0)


def test_a_restart_remembers_the_best(tmp_path):
    cadence = Cadence(eval_every=4, checkpoint_every=4, keep_checkpoints=1)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(
            tmp_path,
            evaluate=kl_at({0: 9.0, 4: 3.0, 8: 1.0, 12: 5.0}),
            cadence=cadence,
            batch=stop_at(ACCUMULATE * 14, crash),
        )
    assert saved(tmp_path) == ["step-00000008", "step-00000012"]
    result = run(tmp_path, evaluate=kl_at({12: 5.0, 16: 2.0, 20: 4.0}), cadence=cadence)
    assert (result.best_step, result.best) == (8, 1.0)
    assert saved(tmp_path) == ["step-00000008", "step-00000020"]


def test_without_a_measure_there_is_no_best(tmp_path):
    assert run(tmp_path).best_step is None
    assert saved(tmp_path) == ["step-00000016", "step-00000020"]
