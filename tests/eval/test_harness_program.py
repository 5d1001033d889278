"""eval.harness: what it writes, what it refuses, and that all ways to run the harness say the same."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from distill import convert
from distill.errors import UserError
from eval import perplexity, recall
from eval.findings import Findings, read_findings
from eval.sections import SECTIONS
from tests.conftest import CHECKOUT, SHAPE

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (the dev extra brings it)", allow_module_level=True)

TASKS = ["recall_phonebook", "recall_copying_written", "text_perplexity"]
DRAWN = {"items": 2, "samples": 5, "seed": 3}


@pytest.fixture(scope="module")
def models(stdlib_teacher, tmp_path_factory):
    """Folders of a tiny teacher and two students, with settings of their own for generation, which must not count."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), AutoTokenizer.from_pretrained(stdlib_teacher)
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "initializer_range": 0.2}
    teacher = LlamaForCausalLM(LlamaConfig(**shape | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}))
    for name, keep in (("teacher", None), ("hybrid", [1]), ("mamba", [])):
        model = teacher if keep is None else convert(teacher, keep_attention=keep)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("teacher", "hybrid", "mamba")}


@pytest.fixture
def custom(tmp_path) -> Path:
    """A folder with a task of one's own, whose number tells every character that was written."""
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "spelt.yaml").write_text(
        """
task: spelt
custom_dataset: !function spelling.prompts
output_type: generate_until
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: ""
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
process_results: !function spelling.number
metric_list: [{metric: number, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
    )
    (folder / "spelling.py").write_text(
        """
from datasets import Dataset

TEXTS = ["def main(", "import", "class A:", "x = 1", "if"]

def prompts(**_metadata):
    return {"test": Dataset.from_list([{"prompt": text} for text in TEXTS])}

def number(doc, results):
    return {"number": float(sum(ord(one) * (place + 1) for place, one in enumerate(results[0])))}
"""
    )
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    """Two documents, one of them longer than the models' positions."""
    written = Path(json.__file__).read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(f"{written[:500]}\n----\n{written[600:2000]}")
    return tmp_path / "text.txt"


def test_metadata_is_yaml_or_text():
    from eval.harness.__main__ import _values

    assert _values(["a=3", "text=*.txt", "b=[x, 1]", "c=x=y"]) == {"a": 3, "text": "*.txt", "b": ["x", 1], "c": "x=y"}


def refused(capsys, *arguments, **options) -> str:
    from eval.harness.__main__ import main

    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(*arguments, **options)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_the_section():
    def score(value: float, perplexity: float) -> dict:
        return {
            "kind": "multiple_choice",
            "samples": 8,
            "metrics": {"acc": value, "word_perplexity": perplexity},
            "errors": {"acc": 0.05},
            "higher_is_better": {"acc": True, "word_perplexity": False},
        }

    results = {"one": {"a": score(0.5, 9.0), "b": score(0.25, 20.0)}, "two": {"a": score(0.7, 2.0), "b": score(0.2, 3)}}
    section = SECTIONS["harness"](Findings("harness", {"a": "x/a", "b": "x/b"}, {}, results))
    assert section.lead == "On average over its tasks a is right 60.0% of the time; b 22.5%, which is 37.5% of that."
    (table,) = section.tables
    assert table.rows[0] == ["one", "acc", "chosen among answers", "50.0% ± 5.0", "25.0% ± 5.0"]
    assert table.rows[1][3:] == ["9.000", "20.000"]
    assert "8 questions a task" in table.note
    alone = {task: {"a": by_model["a"]} for task, by_model in results.items()}
    section = SECTIONS["harness"](Findings("harness", {"a": "x/a"}, {}, alone))
    assert section.lead == "On average over its tasks a is right 60.0% of the time."


@pytest.mark.slow  # importing the harness takes half a minute on a busy machine
def test_mistakes_are_told_before_a_model_is_loaded(models, tmp_path, capsys, monkeypatch):
    from eval.harness.model import DistillLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("eval.harness.model.load_model", lambda *_: pytest.fail("a model was loaded"))
    out, teacher = tmp_path / "none", models["teacher"]
    said = refused(capsys, [teacher], ["recall_phonbook"], output=out)
    assert "--task recall_phonbook: there is no such task; did you mean recall_phonebook" in said
    assert "there is no such folder" in refused(capsys, [teacher], TASKS, tasks_from=[tmp_path / "x"], output=out)
    said = refused(capsys, [teacher], ["text_perplexity"], metadata=["text=none.txt"], output=out)
    assert "'none.txt': no such file" in said
    assert "--metadata text: give KEY=VALUE" in refused(capsys, [teacher], TASKS, metadata=["text"], output=out)
    with pytest.raises(UserError, match="the model 'distill' does not take it"):
        DistillLM(teacher, gguf_file="x")
    assert not out.exists()


def started(*words: str) -> subprocess.Popen[str]:
    """A command in the checkout, without a network."""
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=CHECKOUT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(process: subprocess.Popen[str]) -> str:
    told, _ = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return told


def from_the_harness(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics that the harness's own command line wrote, by task."""
    (file,) = folder.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in found.items()
            if isinstance(value, float) and key.endswith(",none") and "_stderr" not in key
        }
        for task, found in results.items()
    }


def from_us(folder: Path, model: str) -> dict[str, dict[str, float]]:
    return {
        task: by_model[model]["metrics"] for task, by_model in read_findings(folder / "harness.json").results.items()
    }


@pytest.mark.slow  # four processes that import the harness, two of which read its index of 15,000 tasks
def test_one_process_two_processes_and_the_harness_itself_agree(models, custom, text, tmp_path, monkeypatch):
    """Multiple choice, generation and rolling likelihood, by this project's tasks and by one of one's own."""
    from eval.harness.__main__ import main
    from eval.harness.names import TASKS as FOLDER

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hybrid = models["hybrid"]
    metadata = DRAWN | {"text": str(text), "separator": "----"}
    pairs = [f"{key}={value}" for key, value in metadata.items()]
    tasks = [*TASKS, "spelt"]
    ours = [word for task in tasks for word in ("--task", task)] + ["--tasks-from", str(custom)]
    ours += [word for pair in pairs for word in ("--metadata", pair)]
    accelerate, lm_eval = (str(Path(sys.executable).parent / name) for name in ("accelerate", "lm_eval"))
    launch = (accelerate, "launch", "--config_file", "recipes/launch/ddp.yaml", "--num_processes", "2")
    shell = ("--metadata", json.dumps(metadata), "--device", "cpu", "--batch_size", "3", "--tasks")
    every = shutil.copytree(FOLDER, tmp_path / "every")  # the harness takes one folder
    shutil.copytree(custom, every, dirs_exist_ok=True)
    running = [
        started(*launch, "-m", "eval.harness", hybrid, *ours, "--output", str(tmp_path / "two")),
        started(
            *(lm_eval, "--model", "hf", "--model_args", f"pretrained={hybrid},trust_remote_code=True"),
            *(*shell, ",".join(tasks), "--include_path", str(every), "--output_path", str(tmp_path / "hf")),
        ),
        started(
            *(sys.executable, "-m", "eval.harness.lm_eval", "--model", "distill"),
            *(
                "--model_args",
                f"pretrained={hybrid}",
                *shell,
                ",".join(TASKS),
                "--output_path",
                str(tmp_path / "distill"),
            ),
        ),
    ]
    main([hybrid], tasks, tasks_from=[custom], metadata=pairs, output=tmp_path / "one")
    expected = from_us(tmp_path / "one", "hybrid")
    assert expected["text_perplexity"]["byte_perplexity"] > 1
    assert expected["spelt"]["number"] > 1000
    told = [ended(process) for process in running]
    assert told[0].count("text_perplexity  ") == 1  # one of the two tells it
    assert re.findall(r"generate_until requests: 100%\|[^|]*\| (\d+)/", told[0]) == ["6"]  # of ten: its own part
    found = [from_us(tmp_path / "two", "hybrid"), *(from_the_harness(tmp_path / name) for name in ("hf", "distill"))]
    for one, names in zip(found, (tasks, tasks, TASKS), strict=True):
        assert one == {name: pytest.approx(expected[name], rel=1e-5) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "mamba"])
def test_our_programs_measure_what_the_harness_does(name, models, text, tmp_path, capsys, monkeypatch):
    """With one beginning of text: where a tokenizer writes it itself, the harness's rolling windows have a second."""
    from eval.harness.model import DistillLM
    from eval.harness.names import manager_of
    from eval.harness.scores import scores

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    short, tasks = tmp_path / "short.txt", ["recall_phonebook", "text_perplexity"]
    short.write_text(text.read_text()[:300])
    lm = DistillLM(models[name], device="cpu", batch_size=4, add_bos_token=False)
    found = scores(lm, tasks, manager_of(tasks, [], DRAWN | {"text": str(short)}), None)
    perplexity.main(models[name], [str(short)], block=256, device="cpu", as_json=True)
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    for metric, number in (("word_perplexity", len(re.split(r"\s+", short.read_text()))), ("byte_perplexity", 300)):
        log = math.log(found["text_perplexity"].metrics[metric])
        assert log == pytest.approx(scored["loss"] * scored["tokens"] / number, rel=1e-5)
    lm.add_bos_token = None
    found = scores(lm, tasks[:1], manager_of(tasks[:1], [], DRAWN), None)
    recall.main([models[name]], ["phonebook"], items="2", samples=5, seed=3, output=tmp_path, device="cpu")
    (cell,) = read_findings(tmp_path / "recall.json").results["phonebook"][name]
    assert found["recall_phonebook"].metrics["acc"] == cell["chosen"]


@pytest.mark.slow
def test_what_limits_a_models_length(models):
    from lm_eval.api.instance import Instance

    from eval.harness.model import DistillLM, require_positions

    teacher, mamba = (DistillLM(models[name], device="cpu") for name in ("teacher", "mamba"))
    assert teacher.max_length == 256
    assert mamba.max_length > 1e6
    texts = [Instance("loglikelihood_rolling", {}, (json.__doc__,), 0)]
    assert len(mamba.tok_encode(json.__doc__)) > 3 * 256
    limited = DistillLM(models["mamba"], device="cpu", max_length=256)
    assert limited.max_length == 256
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="max_length=33: the model has a vector for each of 32 positions"):
        require_positions(learned, 33)
    require_positions(learned, 32)
    assert mamba.loglikelihood_rolling(texts) == limited.loglikelihood_rolling(texts)
    assert mamba.max_length > 1e6
