"""What happens to a run of several processes when something breaks, phase by phase, and that nothing is lost.

docs/faults.md has a row for each of these.
"""

import errno
import functools
import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

import distill.run
from distill import teacher_fed
from distill.capture import LayerTrace, traced_layers
from distill.training import checkpoint
from stages import hidden
from tests.stages.conftest import CALM, STEPS, write_recipe
from tests.stages.launch import Launch, Left, Ranks
from tests.stages.program import require_refused, run
from tests.stages.run_folder import STAGES, contents, metrics, require_same_run
from tests.stages.small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.slow

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def unfinished(run: Path, to: Path, *stages: str) -> Path:
    """A copy of a whole run in which the last ``stages`` are still to be made."""
    copy = Path(shutil.copytree(run, to))
    for stage in stages:
        shutil.rmtree(copy / stage)
        shutil.rmtree(copy / "training" / stage)
    return copy


def made(folder: Path, stage: str, steps: int) -> Callable[[], bool]:
    """Whether the stage has come so far."""
    path = folder / "training" / stage / "metrics.jsonl"
    return lambda: path.is_file() and path.read_text().count('"train"') >= steps


def newest(folder: Path, stage: str) -> Path:
    return max((folder / "training" / stage / "checkpoints").glob("step-*"))


def require_done(left: Left) -> None:
    assert not any(left.codes), left.log


def require_same_stage(got: Path, expected: Path) -> None:
    assert metrics(got) == metrics(expected)
    assert (got / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def require_refused_once(left: Left, said: str) -> None:
    """Every process ends with 2, and one of them says this."""
    assert set(left.codes) == {2}, left.log
    assert left.log.count(said) == 1, left.log
    assert "Traceback" not in left.log


@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero3"])
def test_a_rank_killed_mid_stage(uninterrupted, recipe, config):
    """Under the launcher: it ends, says why, and the same command makes what an uninterrupted run makes, bit for bit.

    Sums over two processes have one order, and two processes draw no number that a checkpoint does not hold.
    """
    expected = uninterrupted(config)
    folder = unfinished(expected, recipe.with_name("run"), "hidden", "logits")
    command = config, "stages.run", recipe, *CALM
    launch = Launch(*command)
    launch.signal_when(signal.SIGKILL, made(folder, "hidden", 7), rank=1)
    left = launch.wait()
    assert left.codes == (1,), left.log
    assert "exitcode  : -9" in left.log
    assert "Signal 9 (SIGKILL) received" in left.log

    saved = newest(folder, "hidden")
    ranks = Ranks(*command)
    ranks.signal_when(signal.SIGKILL, made(folder, "logits", 13), rank=0)
    left = ranks.wait()
    assert left.codes[0] == -signal.SIGKILL
    assert left.codes[1] not in (0, -signal.SIGKILL)
    assert f"continuing from {saved}" in left.log

    saved = newest(folder, "logits")
    left = Ranks(*command).wait()
    require_done(left)
    assert f"continuing from {saved}" in left.log
    require_same_run(folder, expected)


def test_four_processes_go_on_to_the_last_bit(uninterrupted, recipe):
    """Where sums have more than one order: it must not depend on when the run was started."""
    start = unfinished(uninterrupted("ddp"), recipe.with_name("start"), "logits")
    for name in ("through", "run"):
        shutil.copytree(start, recipe.with_name(name))
    command = "ddp", "stages.logits", recipe, *CALM
    require_done(Ranks(*command, f"run_dir={recipe.with_name('through')}", ranks=4).wait())
    folder = recipe.with_name("run")
    ranks = Ranks(*command, ranks=4)
    ranks.signal_when(signal.SIGKILL, made(folder, "logits", 7), rank=2)
    assert ranks.wait().codes[2] == -signal.SIGKILL
    left = Ranks(*command, ranks=4).wait()
    require_done(left)
    assert "continuing from" in left.log
    require_same_stage(folder / "logits", recipe.with_name("through") / "logits")


def test_the_launcher_is_asked_to_stop_twice(uninterrupted, recipe):
    """All processes finish the step and save, though asked again; the same command goes on from there."""
    expected = uninterrupted("fsdp2")
    folder = unfinished(expected, recipe.with_name("run"), "hidden", "logits")
    command = "fsdp2", "stages.run", recipe, *CALM
    launch = Launch(*command)
    launch.signal_when(signal.SIGTERM, made(folder, "hidden", 8))
    # The second time the launcher does not wait, but its processes do.
    launch.signal_when(signal.SIGTERM, lambda: "closing signal SIGTERM" in launch.log())
    left = launch.wait()
    assert left.codes == (1,)
    step = metrics(folder / "training/hidden")[-1]["step"]
    assert f"stopped by SIGTERM after step {step} of {STEPS}; the same command goes on from there" in left.log
    left = Ranks(*command).wait()
    require_done(left)
    assert f"continuing from {folder}/training/hidden/checkpoints/step-{step:08d}" in left.log
    require_same_run(folder, expected)


@pytest.fixture(scope="module")
def killed(uninterrupted, tmp_path_factory, saved_teacher, text) -> Callable[[str], Path]:
    """A run under a config of which a process was killed in stage 2, after two checkpoints; killed once."""

    @functools.cache
    def killed_once(config: str) -> Path:
        expected, folder = uninterrupted(config), tmp_path_factory.mktemp("killed")
        stopped = unfinished(expected, folder / "run", "hidden", "logits")
        ranks = Ranks(config, "stages.run", write_recipe(folder, saved_teacher, text), *CALM)
        ranks.signal_when(signal.SIGKILL, made(stopped, "hidden", 13), rank=1)
        assert ranks.wait().codes[1] == -signal.SIGKILL
        return stopped

    return killed_once


@pytest.mark.parametrize(
    ("before", "after", "ranks"),
    [("fsdp2", "one", 1), ("fsdp2", "ddp", 2), ("ddp", "fsdp2", 4), ("zero1", "zero2", 2)],
)
def test_going_on_with_other_processes(uninterrupted, killed, recipe, before, after, ranks):
    """The losses that follow are one process's, as near as those of any other number of processes."""
    folder = Path(shutil.copytree(killed(before), recipe.with_name("run")))
    saved, command = newest(folder, "hidden"), ("stages.run", recipe, *CALM)
    if after == "one":
        ended = run(*command)
        assert ended.code == 0, ended.err
        said = ended.err
    else:
        left = Ranks(after, *command, ranks=ranks).wait()
        require_done(left)
        said = left.log
    assert f"continuing from {saved}" in said
    for stage in STAGES[1:]:
        losses, expected = ([row["loss"] for row in metrics(run / stage)] for run in (folder, uninterrupted("one")))
        assert losses == pytest.approx(expected, rel=1e-4)


FOREIGN: dict[str, tuple[str, str, int, str]] = {
    "DeepSpeed on more processes": ("zero2", "zero2", 4, "by DeepSpeed on 2 processes and this run has 4; launch as"),
    "DeepSpeed's by FSDP2": ("zero2", "fsdp2", 2, "was written by DeepSpeed, which alone can read it"),
    "DeepSpeed's by one process": ("zero2", "one", 1, "was written by DeepSpeed, which alone can read it"),
    "ZeRO-2's by ZeRO-3": ("zero2", "zero3", 2, "by another stage of ZeRO; go on with zero1.yaml or zero2.yaml"),
    "FSDP2's by ZeRO-2": ("fsdp2", "zero2", 2, "was not written by DeepSpeed, which reads its own checkpoints only"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_checkpoint_that_this_engine_cannot_read(killed, recipe, case):
    before, after, ranks, said = FOREIGN[case]
    folder = Path(shutil.copytree(killed(before), recipe.with_name("run")))
    saved = contents(folder / "training")
    if after == "one":
        require_refused(run("stages.run", recipe, *CALM), said)
    else:
        require_refused_once(Ranks(after, "stages.run", recipe, *CALM, ranks=ranks).wait(), said)
    assert contents(folder / "training") == saved


def test_layers_go_on_after_a_kill(uninterrupted, recipe):
    expected = uninterrupted("one")
    folder = unfinished(expected, recipe.with_name("run"), "hidden", "logits")
    command = "ddp", "stages.hidden", recipe, *CALM, "stages.hidden.parallel=layers"
    ranks = Ranks(*command)
    ranks.signal_when(signal.SIGKILL, made(folder, "hidden", 7), rank=1)
    assert ranks.wait().codes[1] == -signal.SIGKILL
    saved = newest(folder, "hidden")
    left = Ranks(*command).wait()
    require_done(left)
    assert f"continuing from {saved}" in left.log
    require_same_stage(folder / "hidden", expected / "hidden")


def saving(folder: Path, stage: str, step: int) -> bool:
    """Whether the checkpoint of a step is being written, or was just now."""
    return any((folder / "training" / stage / "checkpoints").glob(f"*step-{step:08d}*"))


def handing_on(folder: Path, stage: str) -> bool:
    return (folder / f".{stage}.partial").exists() or (folder / stage).exists()


MOMENTS: dict[str, tuple[int, Callable[[Path], bool]]] = {
    "the text is being prepared": (0, lambda run: (run / ".data.parts").exists() or (run / "data").exists()),
    "the text was prepared": (1, lambda run: (run / "data").exists()),
    "converting": (0, lambda run: (run / "teacher/evaluation.json").exists()),
    "before a checkpoint": (1, lambda run: made(run, "mixing", 3)()),
    "the main process saves": (0, lambda run: saving(run, "mixing", 6)),
    "another one saves": (1, lambda run: saving(run, "mixing", 12)),
    "the main process hands on": (0, lambda run: handing_on(run, "mixing")),
    "between two stages": (1, lambda run: (run / "mixing/evaluation.json").exists()),
    "another one hands on": (1, lambda run: handing_on(run, "hidden")),
    "the last stage": (0, lambda run: made(run, "logits", 20)()),
}


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_killed_in_every_phase(uninterrupted, recipe, config):
    """Whoever is killed, and in whatever, the other one ends by itself, and the same command goes on."""
    folder = recipe.with_name("run")
    for moment, (rank, has_come) in MOMENTS.items():
        ranks = Ranks(config, "stages.run", recipe, *CALM)
        ranks.signal_when(signal.SIGKILL, lambda has_come=has_come: has_come(folder), rank=rank)
        codes = ranks.wait().codes
        assert codes[rank] == -signal.SIGKILL, moment
        assert codes[1 - rank] not in (0, -signal.SIGKILL), moment
    require_done(Ranks(config, "stages.run", recipe, *CALM).wait())
    require_same_run(folder, uninterrupted(config))


NAN_AT = 9
"""The step whose batch is poisoned: after a checkpoint, before the next."""


def poisoned(rank: int) -> None:
    """Let one layer of this process's student read NaN from a step on."""
    steps = itertools.count(1)

    def traces(*arguments: Any) -> Iterator[tuple[int, LayerTrace]]:
        poison = rank == 1 and next(steps) >= NAN_AT
        for index, trace in traced_layers(*arguments):
            if poison and index == 2:
                trace.attention_input = trace.attention_input * math.nan
            yield index, trace

    teacher_fed.traced_layers = traces


@pytest.mark.parametrize("config", ENGINES)
def test_nan_in_one_process(uninterrupted, recipe, config):
    """All processes stop, one of them says where it began, and the checkpoints are as they were."""
    expected = uninterrupted(config)
    folder = unfinished(expected, recipe.with_name("run"), "hidden", "logits")
    left = Ranks(config, "stages.run", recipe, *CALM, before=poisoned).wait()
    said = f"the loss of layers.2 is not finite at step {NAN_AT}. It began at the output of model.layers.2.self_attn"
    require_refused_once(left, said)
    saved = folder / "training/hidden/checkpoints/step-00000006"
    assert f"on process 1. Nothing was overwritten: the last good checkpoint is {saved}" in left.log
    assert list(saved.parent.iterdir()) == [saved]
    assert checkpoint.damage_of(saved) is None
    assert [row["step"] for row in metrics(folder / "training/hidden") if row["kind"] == "train"] == [*range(1, NAN_AT)]
    require_done(Ranks(config, "stages.hidden", recipe, *CALM).wait())
    require_same_stage(folder / "hidden", expected / "hidden")


def poisoned_gradient(rank: int) -> None:
    """Let nothing be wrong with this process's losses, and its gradients be NaN from a step on."""
    calls, distance = itertools.count(1), hidden.hidden_distance

    def harmed(output_BTD: Tensor, *rest: Any, **options: Any) -> Tensor:
        if rank == 1 and next(calls) > 4 * (NAN_AT - 1):  # forward, and again in backward, of two layers
            output_BTD.register_hook(lambda gradient: gradient * math.nan)
        return distance(output_BTD, *rest, **options)

    hidden.hidden_distance = harmed


@pytest.mark.parametrize("config", ["fsdp2", "zero2"])
def test_a_nan_gradient_in_one_process(uninterrupted, recipe, config):
    """The same where only the norm shows it, which all processes have in common."""
    expected = uninterrupted(config)
    folder = unfinished(expected, recipe.with_name("run"), "hidden", "logits")
    left = Ranks(config, "stages.run", recipe, *CALM, before=poisoned_gradient).wait()
    saved = folder / "training/hidden/checkpoints/step-00000006"
    require_refused_once(left, f"the gradient is not finite at step {NAN_AT}.")
    assert f"Nothing was overwritten: the last good checkpoint is {saved}" in left.log
    assert list(saved.parent.iterdir()) == [saved]
    require_done(Ranks(config, "stages.hidden", recipe, *CALM).wait())
    require_same_stage(folder / "hidden", expected / "hidden")


@pytest.mark.parametrize("config", ["fsdp2", "zero2"])
def test_a_truncated_shard(uninterrupted, killed, recipe, config):
    """The checkpoint is refused by name, and the one before it leads to the same end."""
    folder = Path(shutil.copytree(killed(config), recipe.with_name("run")))
    damaged = newest(folder, "hidden")
    before = checkpoint.before(damaged)
    shard = max((damaged / "state").rglob("*"), key=lambda path: path.stat().st_size)
    size = shard.stat().st_size
    os.truncate(shard, size - 9)
    left = Ranks(config, "stages.run", recipe, *CALM).wait()
    require_done(left)
    refusal = f"refused a damaged checkpoint: {shard} has {size - 9:,} bytes instead of {size:,}; trying the one before"
    assert left.log.count(refusal) == 1
    assert f"continuing from {before}" in left.log
    require_same_run(folder, uninterrupted(config))


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path, megabytes=4) as disk:
        yield disk


@pytest.mark.parametrize("config", ["fsdp2", "zero2"])
def test_the_disk_fills_up_in_a_checkpoint(uninterrupted, killed, recipe, disk, config):
    """There is room for two checkpoints and not for a third."""
    expected, pages = uninterrupted(config), 4096
    files = newest(killed(config), "hidden").rglob("*")
    size = sum(-(-path.stat().st_size // pages) * pages for path in files)
    unfinished(expected, disk.run, "hidden", "logits")
    command = config, "stages.hidden", recipe, *CALM, f"run_dir={disk.run}"
    disk.leave(int(2.6 * size))
    require_refused_once(Ranks(*command).wait(), "/step-00000018: the disk is full. Writing it needs")
    saved = sorted((disk.run / "training/hidden/checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-00000006", "step-00000012"]
    assert not [damage for damage in map(checkpoint.damage_of, saved) if damage]
    disk.free()
    left = Ranks(*command).wait()
    require_done(left)
    assert f"continuing from {saved[1]}" in left.log
    require_same_stage(disk.run / "hidden", expected / "hidden")


def cannot_write(file: str, rank: int) -> None:
    """Let a process find no space for this file."""
    save, create_stream = torch.save, FileSystem.create_stream

    def require_space(path: object) -> None:
        if file in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def saving(value: object, path: object, **options: object) -> None:
        require_space(path)
        save(value, path, **options)

    def creating(self: FileSystem, path: object, mode: str) -> object:
        require_space(path)
        return create_stream(self, path, mode)

    torch.save, FileSystem.create_stream = saving, creating


@pytest.mark.parametrize(
    ("config", "file"), [("ddp", "rng-00001"), ("fsdp2", "__1_0.distcp"), ("zero2", "zero_pp_rank_1")]
)
def test_one_process_alone_cannot_write(uninterrupted, recipe, config, file):
    """None of them waits for what will not come: all end, one says why, and no checkpoint is left half-written."""
    folder = unfinished(uninterrupted(config), recipe.with_name("run"), "hidden", "logits")
    left = Ranks(config, "stages.hidden", recipe, *CALM, before=functools.partial(cannot_write, file)).wait()
    require_refused_once(left, "/step-00000006: the disk is full. Writing it needs")
    assert list((folder / "training/hidden/checkpoints").iterdir()) == []


MISTAKES = {
    "teacher.path=/nowhere": "/nowhere",
    "stages.mixing.batch_size=3": "batch_size is 3, which 2 processes cannot share evenly",
    "data.source=/nowhere": "/nowhere",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_recipe_is_said_once(recipe, mistake):
    require_refused_once(Ranks("ddp", "stages.run", recipe, *CALM, mistake).wait(), MISTAKES[mistake])
    assert not recipe.with_name("run").exists()


def test_a_report_that_cannot_be_made_is_said_once(uninterrupted, recipe):
    folder = Path(shutil.copytree(uninterrupted("ddp"), recipe.with_name("run")))
    (folder / "mixing/metrics.jsonl").write_text("no\nmetrics\n")
    require_refused_once(Ranks("ddp", "stages.run", recipe, *CALM).wait(), "metrics.jsonl:1: is no metrics line")


LATE = """
import os, runpy, time

time.sleep(2 if os.environ["RANK"] == "0" else 0)
runpy.run_module("stages.run", run_name="__main__", alter_sys=True)
"""


def test_a_mistake_is_said_once_though_the_launcher_ends_all_with_the_first(recipe, tmp_path):
    """And the first to end is not the one that speaks."""
    (tmp_path / "late.py").write_text(LATE)
    left = Launch("ddp", "late", recipe, *CALM, "stages.mixing.lr=-1", path=tmp_path).wait()
    assert left.codes == (1,)
    assert left.log.count("stages.mixing.lr") == 1


def one_settles(rank: int) -> None:
    """Let every process but the main one fail if it touches what killed runs left."""
    if rank != 0:
        nobody_settles(rank)


def nobody_settles(_rank: int) -> None:
    def settle(folder: Path) -> None:
        raise AssertionError(folder)

    distill.run.settle = settle


def test_a_second_run_in_the_same_folder_is_refused(uninterrupted, recipe):
    """Before it changes anything; and the main process alone changes anything."""
    expected = uninterrupted("ddp")
    folder = unfinished(expected, recipe.with_name("run"), "hidden", "logits")
    command = "ddp", "stages.run", recipe, *CALM
    first = Ranks(*command, before=one_settles)
    first.signal_when(signal.SIGSTOP, made(folder, "hidden", 3), rank=0)
    require_refused_once(Ranks(*command, before=nobody_settles).wait(), f"another run is at work in {folder}")
    first.signal_when(signal.SIGCONT, lambda: True, rank=0)
    require_done(first.wait())
    require_same_run(folder, expected)
