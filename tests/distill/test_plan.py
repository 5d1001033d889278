"""`distill plan` for many devices: which engine it names, how long it says, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distill import cli
from distill.checks import check
from distill.errors import UserError
from distill.recipe import load_recipe
from tests.conftest import CHECKOUT

SHAPES = CHECKOUT / "recipes" / "shapes"
EIGHT = ("--devices", "8", "--device-memory", "80GB", "--flops", "400T")
# Twenty layers of one shape: large enough to tell engines apart on the small devices of these tests.
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(CHECKOUT)

    def _run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["distill", "plan", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Result(int(end.value.code or 0), *capsys.readouterr())

    return _run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(SMALL))
    path = tmp_path / "small.yaml"
    path.write_text(
        f"teacher: {{path: {tmp_path / 'teacher'}}}\ndata: {{source: nowhere, block: 64}}\n"
        "stages:\n  hidden: {tokens: 1M, batch_size: 4, micro_batch_size: 1}\n"
        "  logits: {tokens: 1M, batch_size: 4, micro_batch_size: 1}\n"
    )
    return path


def planned(run: Command, recipe: Path, *options: str) -> dict[str, Any]:
    result = run(recipe, *options, "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def by_mode(stage: dict[str, Any]) -> dict[str, Any]:
    return {placed["mode"]: placed for placed in stage["modes"]}


def test_an_8b_teacher_on_eight_devices_of_80_gb(run: Command) -> None:
    result = run(SHAPES / "llama-3.1-8b.yaml", *EIGHT, "--price", "2.50")
    assert (result.code, result.err) == (0, "")
    assert "weights not found: planned from the config alone" in result.out
    assert max(map(len, result.out.splitlines())) <= 100
    assert [line.split()[1] for line in result.out.splitlines() if line.startswith("●")] == ["zero1", "zero2", "fsdp2"]
    assert "All stages fit under fsdp2" in result.out
    assert "does not fit" not in result.out
    assert "--config_file recipes/launch/fsdp2.yaml -m stages.run" in result.out
    made = planned(run, SHAPES / "llama-3.1-8b.yaml", *EIGHT, "--price", "2.50")["stages"]
    assert [stage["name"] for stage in made] == ["mixing", "hidden", "logits"]
    for stage in made:
        days = stage["tokens"] / stage["tokens_a_day"]
        assert stage["cost"] == pytest.approx(days * 24 * 8 * 2.50)
        assert stage["memory"]["total"] < 0.9 * 80e9
    total = next(line for line in result.out.splitlines() if line.startswith("all "))
    assert f"{sum(stage['cost'] for stage in made):,.0f}" in total


def test_an_8b_teacher_needs_gradient_checkpointing(run: Command) -> None:
    result = run(SHAPES / "llama-3.1-8b.yaml", *EIGHT, "stages.logits.gradient_checkpointing=false")
    assert (result.code, result.out.count("●")) == (0, 2)
    assert "logits does not fit" in result.out
    assert "gradient_checkpointing: true" in result.out
    assert "One stage alone:" in result.out


def test_a_70b_teacher_fits_on_eight_devices_of_80_gb_with_the_hosts_memory_alone(run: Command) -> None:
    recipe = SHAPES / "llama-3.1-70b.yaml"
    result = run(recipe, *EIGHT)
    assert (result.code, "●" in result.out, "Nothing fits as it is." in result.out) == (0, False, True)
    assert max(map(len, result.out.splitlines())) <= 100
    for stage in planned(run, recipe, *EIGHT)["stages"]:
        offload, more = stage["remedies"]
        assert (stage["fits"], offload["mode"], offload["fits"], more["fits"]) == (False, "zero3_offload", True, True)
    more = planned(run, recipe, *EIGHT[2:], "--devices", "64")
    assert [(stage["mode"], stage["fits"]) for stage in more["stages"]] == [("fsdp2", True)] * 3


def test_parts_of_the_8b_plan_by_hand(run: Command) -> None:
    """n and m by the public shape; 28 of 32 layers become mixers of z, x, B, C and dt, and the output."""
    mlp, attention, outside = 3 * 4096 * 14336, 2 * 4096 * (4096 + 1024), 2 * 128256 * 4096
    mixer = 4096 * (4 * 4096 + 32) + 4096 * 4096
    n, m = 28 * mixer + 4 * attention + 32 * mlp + outside, 32 * (attention + mlp) + outside
    mixing, _, logits = planned(run, SHAPES / "llama-3.1-8b.yaml", *EIGHT)["stages"]
    ddp, fsdp2 = by_mode(logits)["ddp"]["memory"], by_mode(logits)["fsdp2"]["memory"]
    assert ddp["teacher"] == pytest.approx(2 * m, rel=1e-3)
    assert ddp["student"] == ddp["gradients"] == ddp["optimizer"] / 2 == pytest.approx(4 * n, rel=1e-3)
    for part in ("teacher", "student", "gradients", "optimizer"):
        assert fsdp2[part] == pytest.approx(ddp[part] / 8, rel=1e-3)
    shape_the_matrix = mixer - 4096 * 4096  # without the output projection
    assert by_mode(mixing)["zero1"]["memory"]["optimizer"] == pytest.approx(12 * 28 * shape_the_matrix / 8, rel=1e-3)


def test_the_first_engine_that_fits_is_the_one_to_use(run: Command, small: Path) -> None:
    everything = planned(run, small, "--devices", "4", "--device-memory", "1TB", "--flops", "1T")["stages"][1]
    assert everything["mode"] == "ddp"
    assert all(part >= 0 for placed in everything["modes"] for part in placed["memory"].values())
    totals = {mode: placed["memory"]["total"] for mode, placed in by_mode(everything).items()}
    assert totals["ddp"] > totals["zero1"] > totals["zero2"] > totals["fsdp2"]
    for mode, smaller in (("ddp", "zero1"), ("zero1", "zero2"), ("zero2", "fsdp2")):
        # Just large enough for it at 90%, and just too small.
        enough = f"{totals[mode] / 0.9 / 1000 + 1:.6f}KB"
        assert _mode_of(run, small, enough) == mode
        too_little = f"{totals[mode] / 0.9 / 1000 - 1:.6f}KB"
        assert _mode_of(run, small, too_little) == smaller


def _mode_of(run: Command, recipe: Path, memory: str) -> str:
    options = ("--devices", "4", "--device-memory", memory, "--flops", "1T")
    stage = planned(run, recipe, *options)["stages"][1]
    assert stage["fits"]
    return stage["mode"]


def test_time_is_the_longer_of_computing_and_sending(run: Command, small: Path) -> None:
    def seconds(mode: str, *options: str) -> float:
        stage = planned(run, small, "--flops", "1T", *options)["stages"][1]
        return by_mode(stage)[mode]["seconds"]

    alone, four = seconds("one"), seconds("ddp", "--devices", "4", "--bandwidth", "1e6")
    assert four == pytest.approx(alone / 4)
    made = planned(run, small, "--flops", "1T", "--devices", "4", "--bandwidth", "0.1")
    stage, student = made["stages"][1], sum(made["parameters"]["student"].values())
    sent = 8 * student * 3 / 4 * stage["steps"]
    assert by_mode(stage)["ddp"]["seconds"] == pytest.approx(sent / 0.1e9)
    assert by_mode(stage)["ddp"]["tokens_a_day"] == pytest.approx(stage["tokens"] / (sent / 0.1e9) * 86400)


def test_by_layers_every_process_reads_all_tokens_and_runs_the_whole_teacher(run: Command, small: Path) -> None:
    # So few operations a second that nothing else counts.
    hidden, _ = planned(run, small, "--device", "h100", "--flops", "1M", "--devices", "4")["stages"]
    modes = by_mode(hidden)
    assert modes["layers"]["steps"] == modes["ddp"]["steps"] == 1_000_000 // (64 * 4)
    teacher = 20 * (2 * (2 * 256 * (256 + 128) + 3 * 256 * 1024) + 4 * 64 * 256)
    student = hidden["flops"] / hidden["tokens"] - teacher
    # DDP runs every layer's forward twice, a third more than forward and backward.
    ratio = (teacher + student / 4) / ((teacher + student * 4 / 3) / 4)
    assert modes["layers"]["seconds"] / modes["ddp"]["seconds"] == pytest.approx(ratio, rel=1e-3)


def test_what_the_recipe_trains_by_layers_is_planned_so_and_runs_under_any_engine(run: Command, small: Path) -> None:
    options = ("--devices", "4", "--flops", "1T", "--device-memory", "1TB")
    data, by_layers = (planned(run, small, *options, *more) for more in ((), ("stages.hidden.parallel=layers",)))
    assert by_layers["stages"][0]["mode"] == "layers"
    assert list(by_mode(by_layers["stages"][0])) == ["layers"]
    assert by_mode(by_layers["stages"][0])["layers"] == by_mode(data["stages"][0])["layers"]
    # Three cannot share four sequences, but they can each read all of them.
    alone = ("--devices", "3", *options[2:], "stages.hidden.parallel=layers", "stages.logits=null")
    assert planned(run, small, *alone)["stages"][0]["mode"] == "layers"
    assert "--config_file recipes/launch/ddp.yaml" in run(small, *options, "stages.hidden.parallel=layers").out


def test_a_result_is_planned_the_same_on_any_number_of_devices(run: Command, small: Path) -> None:
    one, two, four = (planned(run, small, "--flops", "1T", "--devices", str(n))["stages"][1] for n in (1, 2, 4))
    assert one["steps"] == two["steps"] == four["steps"] == 1_000_000 // (4 * 64)
    assert one["tokens"] == two["tokens"] == four["tokens"] == one["steps"] * 4 * 64
    assert one["flops"] == two["flops"] == four["flops"]
    # What a device keeps goes by the sequences of a forward pass, not by those of a step.
    twice = planned(run, small, "--flops", "1T", "--devices", "2", "stages.logits.micro_batch_size=null")["stages"][1]
    assert one["memory"]["activations"] == two["memory"]["activations"] == four["memory"]["activations"]
    assert twice["memory"]["activations"] == pytest.approx(2 * two["memory"]["activations"], rel=0.1)


def test_checkpointing_takes_less_memory_and_more_time(run: Command, small: Path) -> None:
    def logits(*overrides: str) -> dict[str, Any]:
        return planned(run, small, "--flops", "1T", "--devices", "4", *overrides)["stages"][1]

    without, with_it = logits(), logits("stages.logits.gradient_checkpointing=true")
    assert with_it["memory"]["activations"] < without["memory"]["activations"] / 3
    # The layers' forward again, beside the teacher's forward and three of the student's.
    assert 1.1 < with_it["seconds"] / without["seconds"] < 4 / 3
    assert 1.1 < with_it["flops"] / without["flops"] < 4 / 3


def test_cost_is_devices_times_hours_times_price(run: Command, small: Path) -> None:
    made = planned(run, small, "--devices", "4", "--flops", "1G", "--price", "3")
    for stage in made["stages"]:
        assert stage["cost"] == pytest.approx(4 * stage["seconds"] / 3600 * 3)
    assert all(stage["cost"] is None for stage in planned(run, small, "--flops", "1G")["stages"])
    total = sum(stage["cost"] for stage in made["stages"])
    out = run(small, "--devices", "4", "--flops", "1G", "--price", "3").out
    assert f"{total:,.0f}" in next(line for line in out.splitlines() if line.startswith("all "))
    assert "--num_processes 4 --config_file recipes/launch/ddp.yaml -m stages.run" in out


def test_what_would_help_is_tried_until_it_fits(run: Command, small: Path) -> None:
    def logits(memory: str, *overrides: str) -> dict[str, Any]:
        options = ("--devices", "2", "--device-memory", memory, "--flops", "1T", "stages.logits.batch_size=64")
        return planned(run, small, *options, *overrides)["stages"][1]

    whole = "stages.logits.micro_batch_size=null"
    assert logits("1TB", whole)["remedies"] == []
    (only,) = logits("1GB", whole)["remedies"]
    key, sequences = only["change"].split(": ")
    assert (key, only["fits"]) == ("micro_batch_size", True)
    assert logits("1GB", f"stages.logits.micro_batch_size={sequences}")["fits"]
    assert not logits("1GB", f"stages.logits.micro_batch_size={2 * int(sequences)}")["fits"]

    everything = logits("60MB", whole)["remedies"]
    changes = [remedy["change"] for remedy in everything]
    assert changes[:4] == [
        "micro_batch_size: 1",
        "gradient_checkpointing: true",
        "teacher: {dtype: bfloat16}",
        "weights and optimizer on the host",
    ]
    done = [whole]
    settings = (
        "stages.logits.micro_batch_size=1",
        "stages.logits.gradient_checkpointing=true",
        "teacher.dtype=bfloat16",
    )
    for remedy, setting in zip(everything[:3], settings, strict=True):
        done.append(setting)
        assert logits("60MB", *done)["memory"]["total"] == remedy["total"]
    totals = [remedy["total"] for remedy in everything[:3]]
    assert totals == sorted(totals, reverse=True)
    offload, devices = everything[3:]
    assert (offload["mode"], offload["on_host"] > 0) == ("zero3_offload", True)
    assert devices["fits"]
    assert changes[-1] in {f"instead {n} devices" for n in (4, 8, 16, 32, 64)}


def test_more_devices_than_can_share_a_step_come_with_another_batch_size(run: Command, small: Path) -> None:
    options = ("--device-memory", "70MB", "--flops", "1T", "stages.hidden=null", "teacher.dtype=bfloat16")
    options = (*options, "stages.logits.gradient_checkpointing=true")
    (logits,) = planned(run, small, "--devices", "4", *options)["stages"]
    remedy = logits["remedies"][-1]
    devices = remedy["change"].removeprefix("instead ").split(" ")[0]
    assert remedy["change"] == f"instead {devices} devices, batch_size: {devices}"
    (more,) = planned(run, small, "--devices", devices, *options, f"stages.logits.batch_size={devices}")["stages"]
    assert (more["fits"], more["memory"]["total"]) == (True, remedy["total"])


def test_what_would_help_a_stage_by_layers_begins_with_sharing_its_sequences(run: Command, small: Path) -> None:
    options = ("--devices", "3", "--device-memory", "60MB", "--flops", "1T", "stages.logits=null")
    (hidden,) = planned(run, small, *options, "stages.hidden.parallel=layers")["stages"]
    assert hidden["remedies"][0]["change"] == "parallel: data, batch_size: 6"
    assert hidden["remedies"][0]["total"] < hidden["memory"]["total"]


def test_one_device_by_name(run: Command, small: Path) -> None:
    result = run(small, "--device", "rtx4090")
    assert result.code == 0
    assert "one rtx4090, 23.5 GiB each" in result.out
    assert "taken to be 40% of the data sheet" in result.out
    made = planned(run, small, "--device", "rtx4090")
    assert made["rates"]["flops"] == pytest.approx(0.4 * 83e12)  # the recipe computes in float32
    made = planned(run, small, "--device", "rtx4090", "dtype=bfloat16")
    assert made["rates"]["flops"] == pytest.approx(0.4 * 165e12)
    assert made["machine"]["memory"] == 23.5 * 2**30
    given = planned(run, small, "--device", "h100", "--flops", "1T", "--device-memory", "1GB")
    assert (given["rates"]["flops"], given["machine"]["memory"]) == (1e12, 1e9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "h1000"), "--device is 'h1000'; known are a100, h100"),
        (("--device-memory", "80"), "--device-memory is '80'; give bytes with a unit, such as 80GB"),
        (("--flops", "many"), "--flops is 'many'; give operations a second, such as 400T"),
        (("--devices", "0"), "--devices"),
        (("--price", "-1"), "--price"),
        (("--bandwidth", "0"), "--bandwidth"),
        (("--devices", "3"), "stages.hidden.batch_size is 4, which 3 processes cannot share evenly; 3 they can"),
        (("--devices", "1000"), "stages.logits.batch_size is 4, which 1000 processes cannot share evenly; 1000"),
        (("stages.logits.tokens=200",), "stages.logits.tokens: 200 tokens are less than one step"),
    ],
)
def test_wrong_options_end_with_two(run: Command, small: Path, options: tuple[str, ...], said: str) -> None:
    result = run(small, *options)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b"])
def test_a_shape_is_planned_and_not_run(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    monkeypatch.chdir(CHECKOUT)
    recipe = load_recipe(SHAPES / f"{shape}.yaml")
    facts = check(recipe, planning=True)
    assert (facts.weights_found, facts.tokenizer_size) == (False, None)
    with pytest.raises(UserError, match="has no tokenizer"):
        check(recipe)


def test_a_folder_with_weights_is_checked_as_ever(run: Command, small: Path) -> None:
    (small.parent / "teacher" / "model.safetensors").write_bytes(b"12345")
    result = run(small)
    assert result.code == 2
    assert "data.source" in result.err
    assert "teacher.path" in result.err
