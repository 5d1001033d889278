"""One recipe on one process and on several, under every engine: the same losses, the same student.

Where they differ at all, it is because sums are made in another order. In the first stage that stays in the last bits;
steps through a whole random network blow it up, in the gradient more than in the loss. ``TOLERANCE`` is ten times
what was measured.
"""

import functools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill.data import Blocks, TrainingBatches
from distill.objectives import scored_positions
from distill.student import is_student
from tests.stages.conftest import CALM, STEPS, write_recipe
from tests.stages.launch import Ranks
from tests.stages.program import run
from tests.stages.run_folder import STAGES, metrics, require_same_run

pytestmark = pytest.mark.slow

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
TRAINED = STAGES[1:]
TOLERANCE = {"mixing": (1e-6, 1e-5, 1e-6), "hidden": (1e-6, 5e-4, 1e-5), "logits": (1e-4, 5e-2, 1e-4)}
"""By stage: how far a loss, a gradient norm and an evaluation's KL may be from one process's, relatively."""


def rows(run: Path, stage: str, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in metrics(run / stage) if row["kind"] == kind]


def require_close(got: Path, expected: Path, stage: str, loss: float, norm: float, kl: float) -> None:
    """Every step's loss and gradient norm, and every evaluation, within these relative tolerances."""
    for key, kind, tolerance in (("loss", "train", loss), ("grad_norm", "train", norm), ("kl", "eval", kl)):
        ours = [row[key] for row in rows(got, stage, kind)]
        assert ours == pytest.approx([row[key] for row in rows(expected, stage, kind)], rel=tolerance), (stage, key)
    assert [row["lr"] for row in rows(got, stage)] == [row["lr"] for row in rows(expected, stage)]


def require_weights(got: Path, expected: Path, tolerance: float) -> None:
    ours, theirs = load_file(got / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("config", ENGINES)
def test_every_engine_follows_one_process(uninterrupted, config):
    got, expected = uninterrupted(config), uninterrupted("one")
    for stage in TRAINED:
        assert len(rows(got, stage)) == STEPS
        require_close(got, expected, stage, *TOLERANCE[stage])
    assert rows(got, "logits")[0]["grad_norm"] == pytest.approx(rows(expected, "logits")[0]["grad_norm"], rel=1e-4)
    for stage, tolerance in {"convert": 0, "mixing": 1e-6, "hidden": 1e-5, "logits": 1e-4}.items():
        require_weights(got / stage, expected / stage, tolerance)


@pytest.mark.parametrize("config", ENGINES)
def test_its_student_is_like_any_other(uninterrupted, config):
    """The folders are the same files, and transformers alone loads them; the evaluations say the same."""
    got, expected = uninterrupted(config), uninterrupted("one")
    ids = torch.arange(3, 35)[None]
    students = [AutoModelForCausalLM.from_pretrained(folder / "logits") for folder in (got, expected)]
    assert all(is_student(student) and student.dtype == torch.float32 for student in students)
    logits = [student(input_ids=ids).logits for student in students]
    assert torch.allclose(*logits, rtol=0, atol=1e-2 * float(logits[1].detach().std()))
    for stage in STAGES:
        assert {path.name for path in (got / stage).iterdir()} == {path.name for path in (expected / stage).iterdir()}
        measured, wanted = (json.loads((folder / stage / "evaluation.json").read_text()) for folder in (got, expected))
        assert measured["metrics"] == pytest.approx(wanted["metrics"], rel=1e-4, abs=1 / 480)  # a token of 480
        assert measured["layer_distances"] == pytest.approx(wanted["layer_distances"], rel=1e-4)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, saved_teacher, text) -> Path:
    """A recipe of 8 steps a stage on text where some blocks have nothing to predict: documents of a single token."""
    folder = tmp_path_factory.mktemp("uneven")
    words = "\n\n".join(f"{number % 10}" for number in range(12000))
    whole = [path.read_text().replace("\n\n", "\n") for path in sorted(text.glob("json-*.py"))]
    mixed = folder / "text.txt"
    mixed.write_text("\n\n".join([words, *whole]))
    path = write_recipe(folder, saved_teacher, mixed)
    cut = 'block: 32\n  bos: false\n  separator: "\\n\\n"'
    path.write_text(path.read_text().replace("block: 32", cut).replace("3072", "1024"))
    return path


CUTS: dict[str, tuple[str, int, int | None]] = {
    "one, accumulated 4×1": ("one", 1, 1),
    "ddp 2×2": ("ddp", 2, None),
    "ddp 2×1, accumulated": ("ddp", 2, 1),
    "ddp 4×1": ("ddp", 4, None),
    "fsdp2 2×1, accumulated": ("fsdp2", 2, 1),
    "zero2 2×1, accumulated": ("zero2", 2, 1),
    "zero3 2×1, accumulated": ("zero3", 2, 1),
}


@pytest.fixture(scope="module")
def made(uneven) -> Callable[..., Path]:
    """The folder of a run of ``uneven``."""

    def run_under(name: str, config: str, ranks: int, *settings: str) -> Path:
        folder = uneven.with_name(name)
        command = "stages.run", uneven, f"run_dir={folder}", *CALM, *settings
        if config == "one":
            assert run(*command).code == 0
        else:
            left = Ranks(config, *command, ranks=ranks).wait()
            assert not any(left.codes), left.log
        return folder

    return run_under


@pytest.fixture(scope="module")
def whole_batches(made) -> Path:
    """What one process makes of batches of four sequences."""
    return made("whole", "one", 1)


def test_the_text_is_uneven(whole_batches):
    """Else the next test would show nothing: in some steps of stage 3 one of two processes has nothing to predict."""
    halves = TrainingBatches(Blocks(whole_batches / "data", "train", 32), 2, seed=STAGES.index("logits"))
    scored = [int(scored_positions(halves.batch(number)["labels"]).sum()) for number in range(16)]
    assert 0 in scored
    assert max(scored) == 62


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_is_the_same_however_it_is_cut_up(made, whole_batches, cut):
    config, ranks, at_most = CUTS[cut]
    settings = [f"stages.{stage}.micro_batch_size={at_most}" for stage in TRAINED if at_most]
    got = made(cut.translate(str.maketrans(" ×", "__")), config, ranks, *settings)
    for stage in TRAINED:
        require_close(got, whole_batches, stage, *TOLERANCE[stage])


PEERS = (
    "student.rope=keep",
    "stages.mixing.tokens=1024",
    "stages.hidden={tokens: 1024, batch_size: 4, target: heads, projections_frozen: 0.5, weight_decay: 0.0}",
    "stages.logits={tokens: 1024, batch_size: 4, hidden_weight: 0.1}",
)


@pytest.fixture(scope="module")
def with_other_objectives(tmp_path_factory, saved_teacher, text) -> Path:
    """What one process makes in 8 steps a stage of heads, of frozen projections and of layers beside the logits."""
    recipe = write_recipe(tmp_path_factory.mktemp("peers"), saved_teacher, text)
    assert run("stages.run", recipe, *PEERS, *CALM).code == 0
    return recipe.with_name("run")


@pytest.mark.parametrize("config", ["fsdp2", "zero3"])
def test_layers_called_twice_before_a_backward_are_gathered_twice(with_other_objectives, recipe, config):
    """What only these engines could get wrong: a layer runs in the student and alone, with one backward for both."""
    left = Ranks(config, "stages.run", recipe, *PEERS, *CALM).wait()
    assert left.codes == (0, 0), left.log
    for stage in TRAINED:
        require_close(recipe.with_name("run"), with_other_objectives, stage, *TOLERANCE[stage])


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_layers_in_two_processes_are_those_of_one(uninterrupted, tmp_path, saved_teacher, text, config):
    """Under FSDP2 the teacher is in shards, which only all processes together can put together."""
    recipe = write_recipe(tmp_path, saved_teacher, text)
    by_layers = [f"stages.{stage}.parallel=layers" for stage in ("mixing", "hidden")]
    left = Ranks(config, "stages.run", recipe, *CALM, *by_layers, "stages.logits=null").wait()
    assert left.codes == (0, 0), left.log
    got, expected = tmp_path / "run", uninterrupted("one")
    for stage in ("mixing", "hidden"):
        require_close(got, expected, stage, *TOLERANCE[stage])
        if config == "ddp":
            assert metrics(got / stage) == metrics(expected / stage)
            require_weights(got / stage, expected / stage, 0)


def without(run: Path, to: Path, *stages: str) -> Path:
    """A copy of a whole run in which the last ``stages`` are still to be made."""
    copy = Path(shutil.copytree(run, to))
    for stage in stages:
        shutil.rmtree(copy / stage)
        shutil.rmtree(copy / "training" / stage)
    return copy


def one_is_slow(rank: int) -> None:
    batch = TrainingBatches.batch
    if rank == 1:
        TrainingBatches.batch = lambda self, step: time.sleep(0.1) or batch(self, step)


def test_a_process_ten_times_slower_than_the_other_changes_nothing(uninterrupted, recipe):
    expected = uninterrupted("fsdp2")
    got = without(expected, recipe.with_name("run"), "logits")
    left = Ranks("fsdp2", "stages.run", recipe, *CALM, before=one_is_slow).wait()
    assert left.codes == (0, 0), left.log
    require_same_run(got, expected)


@pytest.mark.parametrize("config", ["ddp", "fsdp2", "zero3"])
def test_gradient_checkpointing_changes_nothing(uninterrupted, recipe, config):
    expected = uninterrupted(config)
    got = without(expected, recipe.with_name("run"), "logits")
    command = "stages.logits", recipe, *CALM, "stages.logits.gradient_checkpointing=true"
    left = Ranks(config, *command).wait()
    assert left.codes == (0, 0), left.log
    assert metrics(got / "logits") == metrics(expected / "logits")
    require_weights(got / "logits", expected / "logits", 0)


PRECISIONS = {"teacher": ["teacher.dtype=bfloat16"], "all": ["teacher.dtype=bfloat16", "dtype=bfloat16"]}


@pytest.fixture(scope="module")
def half(tmp_path_factory, saved_teacher, text) -> Callable[[str, str], Path]:
    """A run of 8 steps a stage in bfloat16, made once."""

    @functools.cache
    def made(config: str, precision: str) -> Path:
        folder = tmp_path_factory.mktemp("half")
        recipe = write_recipe(folder, saved_teacher, text)
        recipe.write_text(recipe.read_text().replace("3072", "1024"))
        command = "stages.run", recipe, *CALM, *PRECISIONS[precision]
        left = run(*command) if config == "one" else Ranks(config, *command).wait()
        assert not any([left.code] if config == "one" else left.codes), left
        return folder / "run"

    return made


@pytest.mark.parametrize(
    ("config", "precision"),
    [("ddp", "teacher"), ("fsdp2", "teacher"), ("zero3", "all")],
)
def test_bfloat16_on_two_processes(half, config, precision):
    """A teacher in bfloat16 with a student in float32, and both computing in bfloat16."""
    got, expected = half(config, precision), half("one", precision)
    for stage in TRAINED:
        # An average of two gradients in bfloat16 is another number than one gradient in bfloat16: measured 7e-3 in the
        # loss, and of gradients that nearly cancel not much remains.
        require_close(got, expected, stage, *(TOLERANCE[stage] if precision == "teacher" else (5e-2, math.inf, 5e-2)))
        assert {tensor.dtype for tensor in load_file(got / stage / "model.safetensors").values()} == {torch.float32}
