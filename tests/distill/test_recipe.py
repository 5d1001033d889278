"""What a recipe file may say, what it may not, and how each mistake is reported."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from distill import marked_yaml
from distill.errors import UserError
from distill.recipe import ROLES, STAGE_NAMES, TEXT_ROLES, Keep, Recipe, Student, load_recipe
from distill.schema_errors import nearest

SMALL = """\
teacher: {path: teachers/tiny}
data: {source: python-stdlib}
stages:
  hidden: {tokens: 300K}
  logits: {tokens: 1.5M}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def _write(text: str) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.fixture
def small(write: Callable[[str], Path]) -> Path:
    return write(SMALL)


def message(path: Path, *overrides: str) -> str:
    """What the user reads, without the folder the test runs in."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


def with_logits(text: str) -> str:
    return f"teacher: {{path: t}}\ndata: {{source: s}}\nstages:\n  logits:\n    tokens: 1M\n    {text}\n"


def test_defaults_are_filled_in(small: Path) -> None:
    recipe = load_recipe(small)
    assert recipe.name == "small"
    assert recipe.run_dir == Path("runs/small")
    assert list(recipe.stages.named()) == ["hidden", "logits"]
    assert recipe.stages.mixing is None
    assert recipe.student.keep_attention == Keep(layers=())
    logits = recipe.stages.named()["logits"]
    assert (logits.tokens, logits.lr, logits.mixer_lr, logits.train) == (1_500_000, 1e-3, 1e-3, TEXT_ROLES)
    assert recipe.stages.named()["hidden"].train == ("mixer",)


def test_run_dir_follows_the_name_and_mixer_lr_the_lr(small: Path) -> None:
    recipe = load_recipe(small, ["name=other", "stages.logits.lr=3e-4"])
    assert recipe.run_dir == Path("runs/other")
    assert recipe.stages.logits is not None
    assert recipe.stages.logits.mixer_lr == 3e-4
    recipe = load_recipe(small, ["run_dir=/tmp/x", "stages.logits.mixer_lr=1"])
    assert recipe.run_dir == Path("/tmp/x")
    assert recipe.stages.logits is not None
    assert recipe.stages.logits.mixer_lr == 1.0


@pytest.mark.parametrize(
    ("written", "tokens"),
    [("5000", 5000), ("100K", 10**5), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("1_000", 1000), ("0.5K", 500)],
)
def test_token_counts(small: Path, written: str, tokens: int) -> None:
    logits = load_recipe(small, [f"stages.logits.tokens={written}"]).stages.logits
    assert logits is not None
    assert logits.tokens == tokens


@pytest.mark.parametrize("written", ["100k", "1.0005K", "1e6", "2.0", "-5", "0", "true", "'5000'", "M", "[1]"])
def test_wrong_token_counts(small: Path, written: str) -> None:
    assert "override: stages.logits.tokens: must be" in message(small, f"stages.logits.tokens={written}")


def test_a_path_may_begin_at_home(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert load_recipe(small, ["teacher.path=~/models/tiny"]).teacher.path == "/home/ada/models/tiny"


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4", "+1e-4"])
def test_floats_may_be_written_as_people_write_them(small: Path, written: str) -> None:
    logits = load_recipe(small, [f"stages.logits.lr={written}"]).stages.logits
    assert logits is not None
    assert logits.lr == 1e-4


def test_unknown_key_names_line_path_nearest_and_allowed(write: Callable[[str], Path]) -> None:
    path = write("teacher: {path: t}\ndata: {source: s}\nstages:\n  logits:\n    tokens: 1M\n\n    tokns: 2M\n")
    found = message(path)
    assert found.startswith("small.yaml:7: stages.logits.tokns: unknown key, did you mean 'tokens'? (allowed: tokens, ")
    assert found.endswith("offline_teacher, train)")


def test_key_of_another_section_is_pointed_to(write: Callable[[str], Path]) -> None:
    found = message(write(SMALL + "block: 128\n"))
    assert found.startswith("small.yaml:6: block: unknown key, did you mean 'data.block'?")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lr: fast", "stages.logits.lr: must be a number, not 'fast'"),
        ("lr: '1e-4'", "stages.logits.lr: must be a number, not '1e-4'"),
        ("lr: true", "stages.logits.lr: must be a number, not true"),
        ("lr: 0", "stages.logits.lr: must be greater than 0, not 0"),
        ("lr: .nan", "stages.logits.lr: must be a finite number, not NaN"),
        ("batch_size: true", "stages.logits.batch_size: must be a whole number, not true"),
        ("batch_size: 2.0", "stages.logits.batch_size: must be a whole number, not 2.0"),
        ("batch_size: '2'", "stages.logits.batch_size: must be a whole number, not '2'"),
        (
            "schedule: cosin",
            "stages.logits.schedule: must be one of wsd, cosine, constant, not 'cosin', did you mean 'cosine'?",
        ),
        ("schedule: 3", "stages.logits.schedule: must be one of wsd, cosine, constant, not 3"),
        ("betas: [0.9]", "stages.logits.betas[1]: missing"),
        ("betas: [0.9, 1]", "stages.logits.betas[1]: must be less than 1, not 1"),
        ("betas: [0.9, 0.9, 0.9]", "stages.logits.betas: must have at most 2 items, not [0.9, 0.9, 0.9]"),
        ("betas: 0.9", "stages.logits.betas: must be a list, not 0.9"),
        ("train: []", "stages.logits.train: must name at least one, not []"),
        ("train: [mlp, mlp]", 'stages.logits.train: must not name anything twice, not ["mlp", "mlp"]'),
        ("warmup: 0.95", "stages.logits: warmup + decay must be at most 1, not 1.05"),
        ("clip:", "stages.logits.clip: has no value; give it one, or write null"),
        ("micro_batch_size: 0", "stages.logits.micro_batch_size: must be greater than or equal to 1, not 0"),
        ("gradient_checkpointing: 1", "stages.logits.gradient_checkpointing: must be true or false, not 1"),
        ("tokens: 2M", "stages.logits.tokens: given twice, first on line 5; keep one of them"),
    ],
)
def test_wrong_values(write: Callable[[str], Path], line: str, said: str) -> None:
    place = 4 if "warmup" in line else 6
    assert message(write(with_logits(line))) == f"small.yaml:{place}: {said}"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dtype=float16", "dtype: must be one of float32, bfloat16, not 'float16', did you mean 'bfloat16'?"),
        ("seed=-1", "seed: must be greater than or equal to 0, not -1"),
        ("name=2024", "name: must be text, not 2024: put it in quotes"),
        ("data.bos=1", "data.bos: must be true or false, not 1"),
        ("data.source=[]", "data.source: must name at least one, not []"),
        ("data.held_out.fraction=1", "data.held_out.fraction: must be less than 1, not 1"),
        ("trackers=[tensorbord]", "trackers[0]: must be tensorboard, not 'tensorbord', did you mean 'tensorboard'?"),
        ("student.mixer=mamba", "did you mean 'mamba2'?"),
        ("stages.hidden.parallel=layer", "must be one of data, layers, not 'layer', did you mean 'layers'?"),
        ("stages.logits.parallel=layers", "stages.logits.parallel: unknown key"),
        ("stages.hidden.gradient_checkpointing=true", "stages.hidden.gradient_checkpointing: unknown key"),
        ("stages.hidden.train=[attention]", "stages.hidden.train[0]: must be one of mixer, norms, mlp"),
        ("stages.hidden.train=[mixer, mlp]", "stages.hidden.train: must be [mixer] with target: mixer"),
        ("stages.hidden={tokens: 1K, target: heads, train: [mlp]}", "must be [mixer] with target: heads"),
        ("stages.hidden={tokens: 1K, projections_frozen: 0.5}", "projections_frozen needs weight_decay: 0, not 0.1"),
        (
            "stages.hidden={tokens: 1K, target: block, train: [norms], projections_frozen: 0.5, weight_decay: 0.0}",
            "leave norms out of train",
        ),
        ("stages.logits={tokens: 1K, offline_teacher: {}, hidden_weight: 0.1}", "leave one of them out"),
        ("stages.logits={tokens: 1K, stepwise: {at: [0.0, 0.9], ramp: 0.2}}", "must be less than 1, or the student is"),
        ("stages.logits={tokens: 1K, stepwise: {at: [0.0, 0.9], ramp: 0.2}}", "never trained whole: 0.9 + 0.2 is 1.1"),
        ("student.rope=rotary", "student.rope: must be one of drop, keep, not 'rotary'"),
        ("student={mixer: sliding_window, calibrate: {}}", "student.calibrate: not for sliding_window, whose layers"),
        ("student={mixer: based, calibrate: {}}", "student.calibrate: not for based, which forgets nothing"),
        ("student={from_scratch: true, calibrate: {}}", "student.calibrate: not with from_scratch"),
        ("student.calibrate={outputs: false, memories: false}", "memories and outputs are both false"),
        ("student.calibrate.ridge=0", "student.calibrate.ridge: must be greater than 0, not 0"),
        ("student.keep_attention={count: 1, ratio: 0.5}", "student.keep_attention: give exactly one of layers"),
        ("student.keep_attention={}", "given: none"),
        ("student.keep_attention=[1, a]", "student.keep_attention[1]: must be a whole number, not 'a'"),
        ("student.keep_attention=[1, 1]", "student.keep_attention: must not name anything twice"),
        ("student.window_layers=[1, 1]", "student.window_layers: must not name anything twice"),
        ("student.keep_attention=3", "student.keep_attention: must be a section with the keys layers"),
        ("stages={}", "stages: give at least one of mixing, hidden, logits"),
        ("stages.mixing={}", "stages.mixing.tokens: missing: tokens to train on"),
        ("stages.mixing.lr=1", "stages.mixing.tokens: missing: tokens to train on"),
        ("teacher=x", "teacher: must be a section with the keys path, dtype, not 'x'"),
        ("stages.logits", "stages.logits: must be key=value"),
        ("=3", "must be key=value"),
        ("run_dir=", "run_dir: has no value; give it one, or write null"),
        ("teacher.path.x=1", "teacher.path.x: teacher.path is not a section here; set it as a whole"),
        ("data.separator=[", "data.separator: '[' is not valid YAML; put text in quotes"),
    ],
)
def test_wrong_overrides(small: Path, override: str, said: str) -> None:
    found = message(small, override)
    assert found.startswith("override: ")
    assert said in found
    assert "\n" not in found


def test_overrides_replace_and_remove(write: Callable[[str], Path]) -> None:
    path = write(SMALL + "student: {keep_attention: {count: 1}}\n")
    recipe = load_recipe(
        path,
        ["stages.hidden=null", "student.keep_attention=[0, 2]", 'data.separator="\\n\\n"', "stages.logits.clip=null"],
    )
    assert list(recipe.stages.named()) == ["logits"]
    assert recipe.student.keep_attention.layers == (0, 2)
    assert recipe.data.separator == "\n\n"
    assert recipe.stages.logits is not None
    assert recipe.stages.logits.clip is None


def test_an_override_does_not_blame_the_line_it_replaced(write: Callable[[str], Path]) -> None:
    path = write(SMALL + "student:\n  keep_attention: {count: 1}\n")
    assert message(path, "student.keep_attention={count: x}").startswith("override: student.keep_attention.count: ")


def test_an_override_in_one_section_leaves_its_alias_alone(write: Callable[[str], Path]) -> None:
    path = write("teacher: {path: t}\ndata: {source: s}\nstages:\n  hidden: &same {tokens: 1M}\n  logits: *same\n")
    stages = load_recipe(path, ["stages.logits.tokens=2M"]).stages.named()
    assert (stages["hidden"].tokens, stages["logits"].tokens) == (10**6, 2 * 10**6)


def test_merged_keys_can_be_overridden_where_they_are_merged(write: Callable[[str], Path]) -> None:
    path = write(
        "teacher: {path: t}\ndata: {source: s}\nstages:\n"
        "  hidden: &same {tokens: 1M, lr: 1e-2}\n  logits: {<<: *same, tokens: 2M}\n"
    )
    stages = load_recipe(path).stages.named()
    assert (stages["logits"].tokens, stages["logits"].lr) == (2 * 10**6, 1e-2)


def test_stages_must_stand_in_order(write: Callable[[str], Path]) -> None:
    path = write("teacher: {path: t}\ndata: {source: s}\nstages:\n  logits: {tokens: 1M}\n  mixing: {tokens: 1M}\n")
    assert message(path) == "small.yaml:5: stages.mixing: stands after 'logits'; the order is mixing, hidden, logits"


def test_a_stage_added_by_an_override_takes_its_place(small: Path) -> None:
    assert list(load_recipe(small, ["stages.mixing.tokens=1K"]).stages.named()) == list(STAGE_NAMES)


def test_all_errors_come_together_in_the_order_of_the_file(write: Callable[[str], Path]) -> None:
    path = write("nam: x\nseed: a\ndata: {sorce: s}\nstages:\n  logits: {tokens: 1M, lr: x}\n  logits: {}\n")
    lines = message(path, "dtype=float").splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "small.yaml:",  # the teacher is missing altogether
        "small.yaml:1:",
        "small.yaml:2:",
        "small.yaml:3:",
        "small.yaml:3:",
        "small.yaml:6:",  # and what this logits section lacks is not said on top
        "override:",
    ]


def test_errors_fit_a_screen(write: Callable[[str], Path]) -> None:
    lines = message(write("".join(f"key{number}: 1\n" for number in range(40)))).splitlines()
    assert len(lines) == 16
    assert lines[-1] == "... and 28 more"  # 40 unknown keys and 3 missing ones
    long = message(write(with_logits(f"lr: {'x' * 5000}")))
    assert len(long) < 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "small.yaml: is empty; needed: teacher, data, stages"),
        ("# nothing\n", "small.yaml: is empty; needed: teacher, data, stages"),
        ("- a\n- b\n", "small.yaml: is not a mapping of keys to values"),
        ("hello", "small.yaml: is not a mapping of keys to values"),
        ("a: [1\nb: 2\n", "small.yaml:2: not valid YAML"),
        ("a: 1\n\tb: 2\n", "small.yaml:2: not valid YAML"),
        ("a: !!python/object:os.system x\n", "small.yaml:1: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "small.yaml:2: not valid YAML"),
        ("? [1]\n: 2\n", "small.yaml:1: not valid YAML"),
        ("a: \x07\n", "small.yaml: not valid YAML"),
        ("1: 2\n", "small.yaml:1: 1: unknown key"),
        ("stages: &s {logits: *s}\n", "stages.logits.logits: unknown key"),
    ],
)
def test_files_that_are_no_recipes(write: Callable[[str], Path], text: str, said: str) -> None:
    assert said in message(write(text))


def test_files_that_cannot_be_read(tmp_path: Path, small: Path) -> None:
    assert message(tmp_path / "smal.yaml") == "smal.yaml: no such file, did you mean small.yaml?"
    assert message(tmp_path / "none" / "x.yaml") == "x.yaml: no such file"
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    small.write_bytes(b"name: \xff\xfe")
    assert message(small) == "small.yaml: cannot be read: not UTF-8 text"
    small.write_text("﻿" + SMALL, encoding="utf-8")
    assert load_recipe(small).name == "small"


def test_recipes_cannot_be_changed(small: Path) -> None:
    with pytest.raises(ValidationError):
        load_recipe(small).seed = 3  # type: ignore[misc]


def test_every_key_is_described() -> None:
    def undescribed(model: type[BaseModel], path: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            found += [] if field.description and "\n" not in field.description else [f"{path}{name}"]
            for inner in (field.annotation, *get_args(field.annotation)):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    found += undescribed(inner, f"{path}{name}.")
        return found

    assert undescribed(Recipe) == []


def test_names_are_those_of_the_library() -> None:
    mixers = pytest.importorskip("distill.mixers")
    roles = pytest.importorskip("distill.roles")
    assert set(get_args(Student.model_fields["mixer"].annotation)) == set(mixers.KINDS)
    assert roles.ROLES == ROLES


def test_marks_and_scalars() -> None:
    marked = marked_yaml.read("a: {b: [1,\n  2]}\nc: yes\nd: 12:30\ne: 2024-01-01\nf: 010\n")
    assert marked.value == {"a": {"b": [1, 2]}, "c": "yes", "d": "12:30", "e": "2024-01-01", "f": "010"}
    assert marked.lines[("a", "b", 1)] == 2
    assert marked.lines[("f",)] == 6
    assert marked_yaml.read("").value is None


def test_nearest() -> None:
    assert nearest("LR", ["betas", "lr"]) == ", did you mean 'lr'?"
    assert nearest("zzz", ["betas", "lr"]) == ""
