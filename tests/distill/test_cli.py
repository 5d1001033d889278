"""The `distill` command: what it prints, what it writes, and how it ends."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill import cli, convert, doctor
from distill.errors import UserError
from distill.generation import generate, load
from distill.programs import report_user_errors


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<s>", "</s>", *(f"w{number}" for number in range(62))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def _run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["distill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Result(int(end.value.code or 0), *capsys.readouterr())

    return _run


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path) -> Path:
    path = tmp_path / "small.yaml"
    (tmp_path / "text.txt").write_text("w1 w2 w3\n")
    path.write_text(
        f"teacher: {{path: {teacher}}}\ndata: {{source: {tmp_path / 'text.txt'}, block: 32}}\n"
        "student: {keep_attention: [1]}\n"
        "stages: {mixing: {tokens: 10K}, hidden: {tokens: 20K}, logits: {tokens: 30K, lr: 1e-4}}\n"
    )
    return path


@pytest.mark.parametrize("command", ["plan", "convert", "generate", "export", "doctor"])
def test_help_has_an_example(run: Command, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert f"Example: distill {command}" in result.out
    assert f" {command} " in run("--help").out


def test_runs_as_a_module() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "distill.cli", "plan", "no-such.yaml"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "no-such.yaml: no such file\n"


def test_plan_shows_everything_on_a_screen(run: Command, recipe: Path) -> None:
    result = run("plan", recipe, "stages.logits.tokens=3M", "student.exportable=granite")
    assert result.code == 0
    assert len(result.out.splitlines()) <= 24
    assert "m a m m  3 of 4 become mamba2 (m); layer 1 with attention (a)" in result.out
    assert "exportable: granite (checked)" in result.out
    for word in ("teacher", "student", "128K tokens", "mixing", "hidden", "logits", "activations", "operations"):
        assert word in result.out
    assert f"{3_000_000 // (16 * 32)} " in result.out
    assert not (Path.cwd() / "runs").exists()


def test_plan_as_json(run: Command, recipe: Path, teacher: Path) -> None:
    made = json.loads(run("plan", recipe, "--json").out)
    assert made["layers"] == ["mamba2", "attention", "mamba2", "mamba2"]
    assert made["exportable"] is None
    student = convert(teacher, keep_attention=[1])
    assert sum(made["parameters"]["student"].values()) == sum(p.numel() for p in student.parameters())
    counts = LlamaForCausalLM.from_pretrained(teacher).parameters()
    assert sum(made["parameters"]["teacher"].values()) == sum(p.numel() for p in counts)
    assert made["parameters"]["student"]["head"] == 0  # tied to the embeddings
    kv_bytes_per_token = 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 channels in fp32
    assert made["cache_bytes"]["4096"]["teacher"] == 4 * 4096 * kv_bytes_per_token
    assert made["cache_bytes"]["4096"]["student"] == made["state_bytes"] + 4096 * kv_bytes_per_token
    assert [(stage["name"], stage["steps"]) for stage in made["stages"]] == [
        ("mixing", 10_000 // 512),
        ("hidden", 20_000 // 512),
        ("logits", 30_000 // 512),
    ]
    assert all(stage["epochs"] is None for stage in made["stages"])
    for stage in made["stages"]:
        memory = stage["memory"]
        assert memory.pop("total") == sum(memory.values())
        assert memory["optimizer"] == 2 * memory["gradients"]
        assert stage["seconds"] > stage["flops"] / made["rates"]["flops"]


def test_plan_counts_epochs_over_prepared_data(run: Command, recipe: Path, teacher: Path) -> None:
    from distill.data import Document, prepare

    tokenizer = load(teacher)[1]
    documents = [Document("a", "w5 " * 999), Document("b", "w6 " * 99)]
    prepare(documents[:1], documents[1:], tokenizer, "runs/small/data", block=32)
    made = json.loads(run("plan", recipe, "--json").out)
    assert made["stages"][0]["epochs"] == pytest.approx(10_000 // 512 * 512 / 1000)
    assert f"{10_000 // 512 * 512 / 1000:.3g}" in run("plan", recipe).out


def test_plan_reports_every_mistake_and_no_traceback(run: Command, recipe: Path) -> None:
    result = run("plan", recipe, "stages.logits.tokns=3M", "seed=x")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == "override: seed: must be a whole number, not 'x'"
    assert len(result.err.splitlines()) == 2
    result = run("plan", recipe, "data.block=99", "student.keep_attention=[9]")
    assert (result.code, len(result.err.splitlines())) == (2, 2)


def test_convert_writes_a_student_that_loads(run: Command, teacher: Path) -> None:
    result = run("convert", teacher, "students/hybrid", "--keep-attention", "1,3", "--seed", "5")
    assert (result.code, result.err) == (0, "")
    assert "2 of 4 become mamba2 (m); layers 1, 3 with attention (a)" in result.out
    assert "in_proj x" in result.out
    assert "saved in students/hybrid" in result.out
    student = AutoModelForCausalLM.from_pretrained("students/hybrid")
    assert student.config.distill["layers"] == ["mamba2", "attention", "mamba2", "attention"]
    expected = convert(teacher, keep_attention=[1, 3], seed=5).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in student.state_dict().items())
    assert json.loads(Path("students/hybrid/conversion.json").read_text())["layers"] == student.config.distill["layers"]
    assert run("generate", "students/hybrid", "w5 w6", "--max-new-tokens", "3").code == 0


def test_export_writes_what_transformers_loads(run: Command, teacher: Path) -> None:
    run("convert", teacher, "student", "--keep-attention", "1")
    result = run("export", "student", "out", "--to", "granite")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("verified in fp32: logits differ by at most ")
    assert result.out.endswith("saved in out\n")
    assert type(AutoModelForCausalLM.from_pretrained("out")).__name__ == "GraniteMoeHybridForCausalLM"
    assert run("generate", "out", "w5 w6", "--max-new-tokens", "3").code == 0
    assert run("export", "student", "out", "--to", "bamba").err.startswith("out is not empty; give another folder")
    assert run("export", "student", "student", "--to", "bamba").err.startswith("student is the student itself")
    assert run("export", "student", "out", "--to", "bamba", "--overwrite", "--no-verify").out.startswith("not verified")
    run("convert", teacher, "plain")
    refused = run("export", "plain", "other", "--to", "granite")
    assert (refused.code, refused.out) == (2, "")
    assert "keep one, such as student.keep_attention: [3]" in refused.err
    assert not Path("other").exists()


def test_convert_by_pattern(run: Command, teacher: Path) -> None:
    result = run("convert", teacher, "out", "--keep-attention", "m a", "--mixer", "discrete_mamba2")
    assert "m a m a  2 of 4 become discrete_mamba2 (m); layers" in result.out


def test_convert_keeps_single_heads(run: Command, teacher: Path) -> None:
    result = run("convert", teacher, "out", "--keep-attention", "0", "--keep-heads", "1:0+2,3:1")
    assert (result.code, result.err) == (0, "")
    shown = " ".join(result.out.split())
    assert "a h m h" in shown
    assert "heads that keep attention beside a mixer (h), by layer: 1: 0, 2; 3: 1" in shown
    assert json.loads(Path("out/conversion.json").read_text())["heads"] == {"1": [0, 2], "3": [1]}


def test_convert_with_rotary_positions(run: Command, teacher: Path) -> None:
    result = run("convert", teacher, "out", "--rope", "keep", "--keep-attention", "0")
    assert "3 of 4 become mamba2 (m) with rotary positions; layer 0" in result.out
    assert json.loads(Path("out/conversion.json").read_text())["rope"] == "keep"
    assert json.loads(Path("out/config.json").read_text())["distill"]["mixer"]["rope"] == "keep"


def test_convert_replaces_nothing_by_accident(run: Command, teacher: Path) -> None:
    run("convert", teacher, "out")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert run("convert", teacher, "out", "--seed", "1").err == (
        "out is not empty; give another folder, or --overwrite to replace the model in it\n"
    )
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    assert run("convert", teacher, "out", "--seed", "1", "--overwrite").code == 0
    assert Path("out/model.safetensors").read_bytes() != before[Path("out/model.safetensors")]

    Path("letters").mkdir()
    Path("letters/dear.txt").write_text("keep me")
    assert "--overwrite does not replace" in run("convert", teacher, "letters", "--overwrite").err
    assert "is the teacher itself" in run("convert", teacher, teacher, "--overwrite").err
    assert "dear.txt is a file" in run("convert", teacher, "letters/dear.txt").err
    assert Path("letters/dear.txt").read_text() == "keep me"
    assert (teacher / "model.safetensors").is_file()
    Path("empty").mkdir()
    assert run("convert", teacher, "empty").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep-attention", "1,x"], "--keep-attention is '1,x'; give layers such as 2,5 or a pattern such as mmma"),
        (["--keep-attention", "4"], "keep_attention names layer 4; the teacher has 4 layers"),
        (["--keep-attention", "mma"], "which do not repeat evenly over 4 layers"),
        (
            ["--keep-heads", "1:0,1:2"],
            "keep_heads is '1:0,1:2'; give heads by layer, each layer once, such as 3:0+2,5:1",
        ),
        (["--keep-heads", "1"], "keep_heads is '1'; give heads by layer"),
        (["--rope", "yes"], "rope is 'yes'; allowed are drop, keep"),
        (
            ["--mixer", "mamba"],
            "mixer is 'mamba'; allowed are based, discrete_mamba2, gated_deltanet, hedgehog, mamba2, sliding_window",
        ),
    ],
)
def test_convert_checks_before_it_writes(run: Command, teacher: Path, arguments: list[str], said: str) -> None:
    result = run("convert", teacher, "out", *arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert list(Path.cwd().iterdir()) == []
    assert "no folder nowhere here" in run("convert", "nowhere", "out").err


def test_generate_streams_one_prompt(run: Command, teacher: Path) -> None:
    result = run("generate", teacher, "w5 w6", "--max-new-tokens", "5")
    assert (result.code, result.err) == (0, "")
    model, tokenizer = load(teacher)
    expected = model.generate(torch.tensor([tokenizer("w5 w6")["input_ids"]]), max_new_tokens=5, do_sample=False)
    assert result.out.strip() == tokenizer.decode(expected[0], skip_special_tokens=True)
    assert result.out.startswith("w5 w6 w")


def test_generate_batches_prompts_without_a_padding_token(run: Command, teacher: Path) -> None:
    run("convert", teacher, "out", "--keep-attention", "1")
    for folder in (teacher, Path("out")):
        prompts = ["w5", "w9 w8 w7 w6"]
        alone = [run("generate", folder, prompt, "--max-new-tokens", "6").out.strip() for prompt in prompts]
        together = run("generate", folder, *prompts, "--max-new-tokens", "6").out.strip().split("\n\n")
        assert together == alone


def test_generate_samples_by_seed(run: Command, teacher: Path) -> None:
    def sample(seed: str, *more: str) -> str:
        arguments = ("--max-new-tokens", "9", "--temperature", "1.5", "--seed", seed, *more)
        return run("generate", teacher, "w5", *arguments).out

    assert sample("1") == sample("1")
    assert sample("1") != sample("2")
    # With so little probability allowed, only the likeliest token is left.
    assert sample("1", "--top-p", "1e-6") == run("generate", teacher, "w5", "--max-new-tokens", "9").out


def test_generate_leaves_the_random_state_alone(teacher: Path) -> None:
    model, tokenizer = load(teacher)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    generate(model, tokenizer, ["w5"], max_new_tokens=2, temperature=1.0, seed=9)
    assert torch.equal(torch.rand(1), expected)


def test_generate_ends_where_the_model_does(teacher: Path) -> None:
    model, tokenizer = load(teacher)
    model.generation_config.eos_token_id = None
    full = [text.split() for text in generate(model, tokenizer, ["w5", "w5 w9 w3"], max_new_tokens=6)]
    stop = full[0][3]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stop)
    ended = [text.split() for text in generate(model, tokenizer, ["w5", "w5 w9 w3"], max_new_tokens=6)]
    assert ended[0] == full[0][: full[0].index(stop, 1)]
    new = full[1][3:]
    assert ended[1] == full[1][: 3 + (new.index(stop) if stop in new else 6)]


def test_generate_with_bos(run: Command, teacher: Path) -> None:
    model, tokenizer = load(teacher)
    ids = [tokenizer.bos_token_id, *tokenizer("w5")["input_ids"]]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    result = run("generate", teacher, "w5", "--bos", "--max-new-tokens", "5")
    assert result.out.strip() == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_a_student_of_mixers_alone_has_no_longest_text(run: Command, teacher: Path) -> None:
    arguments = ["w5", "--max-new-tokens", "64"]
    assert "65 " not in (said := run("generate", teacher, *arguments).err)
    assert "1 tokens of prompt and 64 new ones are more than the 64 positions" in said
    run("convert", teacher, "out")
    assert run("generate", "out", *arguments).code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_generate_settings(run: Command, teacher: Path, arguments: list[str], said: str) -> None:
    result = run("generate", teacher, "w5", *arguments)
    assert result.code == 2
    assert said in result.err


def test_generate_names_what_is_wrong_with_a_folder(run: Command, teacher: Path, tmp_path: Path) -> None:
    assert run("generate", "none", "w5").err == (
        "none is not a folder; give one that holds a model, such as a finished stage\n"
    )
    assert "did you mean one of tiny in it?" in run("generate", teacher.parent, "w5").err
    assert "has no token to continue from" in run("generate", teacher, "").err
    (tmp_path / "broken").mkdir()
    for file in teacher.iterdir():
        content = file.read_bytes()
        (tmp_path / "broken" / file.name).write_bytes(content[:-5] if file.suffix == ".safetensors" else content)
    assert "is truncated" in run("generate", "broken", "w5").err


def test_export_writes_a_folder_with_code_and_card(run: Command, teacher: Path) -> None:
    run("convert", teacher, "student", "--keep-attention", "1")
    result = run("export", "student", "out", "--to", "standalone", "--base-model", "org/really")
    assert result.code == 0
    assert "verified in fp32: logits differ by at most 0.0e+00" in result.out
    assert "the teacher's licence is not known; fill it in" in result.out
    assert result.out.endswith("saved in out\n")
    assert Path("out/modeling_distilled_llama.py").is_file()
    card = Path("out/README.md").read_text()
    assert "base_model: org/really" in card
    assert "# out\n" in card
    refused = run("export", "student", "again", "--to", "gguf", "--quantise", "int8")
    assert (refused.code, Path("again").exists()) == (2, False)
    assert "gguf has --outtype instead" in refused.err


def test_doctor(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("doctor")
    assert (result.code, result.err) == (0, "")
    assert f"torch {torch.__version__}" in result.out.replace("\n", " ")
    assert "free at" in result.out
    facts = json.loads(run("doctor", "--json").out)
    assert facts["versions"]["torch"] == torch.__version__
    assert [name for name, backend in facts["scan"].items() if backend["used"]] == ["torch"]
    assert facts["optional"]["mamba_ssm"]["install"].startswith("pip install mamba-ssm")


def test_doctor_survives_what_it_diagnoses(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what a broken installation looks like to an import
    monkeypatch.setattr(doctor, "version", _not_installed)
    monkeypatch.setattr(doctor, "find_spec", lambda module: None)
    result = run("doctor")
    assert result.code == 0
    assert "torch does not import" in result.out
    assert "torch missing" in result.out
    assert "○ tensorboard (trackers: [tensorboard]): not installed;" in result.out


def _not_installed(package: str) -> str:
    raise doctor.PackageNotFoundError(package)


def test_user_errors_end_programs_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    @report_user_errors()
    def program(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        program(UserError("\n".join(f"line {number} " + "x" * 5000 for number in range(100))))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 21
    assert err.endswith("... and 80 more lines\n")
    assert max(map(len, err.splitlines())) == 500
    with pytest.raises(ValueError, match="ours"):
        program(ValueError("ours"))
    with pytest.raises(SystemExit):
        program(UserError(""))
    assert capsys.readouterr().err.strip()
