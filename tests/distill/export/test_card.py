"""The model card: what the records say comes back out of it, what they do not say is said to be unknown."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import MistralConfig

from distill import handover
from distill.cache import cache_nbytes
from distill.conversion import convert
from distill.converting import convert_folder
from distill.export.account import read_account
from distill.export.card import write_card
from distill.export.footprint import AttentionCost, Footprint, footprint_of
from distill.export.written import Quantised, Written
from distill.student import student_config
from tests.conftest import tiny
from tests.distill.export.made_run import STDLIB, make_run

HOME = "/home/somebody"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("made")).parent


def card_of(student: Path, to: Path, base_model: str | None = None, **written) -> ModelCard:
    """The card as the Hub's client reads it from the disk."""
    to.mkdir(exist_ok=True)
    account = read_account(student, base_model)
    return ModelCard.load(write_card(to, account, Written(**{"place": "org/made", "format": "standalone"} | written)))


def test_the_numbers_of_the_run_come_back_out_of_the_metadata(run, tmp_path):
    data = card_of(run / "logits", tmp_path, n_bytes=10).data
    measured = {result.metric_name: result.metric_value for result in data.eval_results}
    assert measured == {
        "Perplexity": pytest.approx(2.718281828**2.25),
        "Perplexity of the teacher": pytest.approx(7.389, abs=1e-3),
        "KL(teacher ‖ student), nats per token": 0.125,
        "Top-1 agreement with the teacher": 0.75,
    }
    assert data.model_name == "made"
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "unknown")
    assert data.datasets == ["org/texts"]
    assert {"mamba2", "distillation", "hybrid", "custom_code"} <= set(data.tags)


def test_nothing_of_this_machine_is_in_it(run, tmp_path):
    text = card_of(run / "logits", tmp_path, n_bytes=10).content
    for place in (HOME, str(tmp_path), str(run), "run_dir"):
        assert place not in text
    assert "distilled from `big-llama`" in text
    assert "path: big-llama" in text
    assert "- books.jsonl" in text
    assert "- /usr/bin/env" in text, "a prompt is no path of this machine"


def test_it_tells_what_was_done_and_what_is_lost(run, tmp_path):
    text = card_of(run / "logits", tmp_path, n_bytes=2048).content
    assert "2 of its 3 layers are Mamba-2 layers; attention is kept in layer 1." in text
    assert "| **after logits** | 2.2500 | 9.49 | 1.284 | 0.1250 | 75.0% |" in text
    assert "| mixing | 1.23K | 7 | 5 | 4 | 42 s |" in text
    assert "its perplexity is 1.284 × the teacher's, and at 25.0% of positions" in text
    assert "trained on sequences of 32 tokens, 2.47K tokens in all" in text
    assert read_account(run / "logits").data.fingerprint in text
    assert "unknown: fill in" in text
    assert "> **" not in text, "a finished student needs no warning"


def test_where_training_stopped_is_the_first_thing_it_says(run, tmp_path):
    assert "> **Not trained: " in card_of(run / "convert", tmp_path, n_bytes=1).content
    half = card_of(run / "mixing", tmp_path, n_bytes=1)
    assert "> **Not finished: its recipe goes on with logits.**" in half.content
    assert half.data.eval_results[0].metric_value == pytest.approx(2.718281828**4)


def test_a_folder_that_convert_wrote_says_what_nobody_recorded(tmp_path):
    convert_folder(str(STDLIB), tmp_path / "alone", mixer="discrete_mamba2", keep="", seed=0, overwrite=False)
    card = card_of(tmp_path / "alone", tmp_path / "out", n_bytes=1)
    assert "a Transformer whose name was not recorded: all of its 4 layers are discrete Mamba-2 layers" in card.content
    assert "No record of any training" in card.content
    assert "length trained on: unknown" in card.content
    assert card.data.eval_results is None
    assert card.data.base_model is None


def test_a_stage_taken_out_of_its_run_keeps_what_is_its_own(run, tmp_path):
    shutil.copytree(run / "logits", tmp_path / "elsewhere" / "logits")
    card = card_of(tmp_path / "elsewhere" / "logits", tmp_path, n_bytes=1)
    assert "The records of the stages before these do not lie beside this model." in card.content
    assert "| **after logits** | 2.2500" in card.content
    assert "| after mixing" not in card.content


def test_a_stage_made_from_something_else_is_not_its_past(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    record = tmp_path / "run" / "mixing" / "stage.json"
    weights = handover.read(record.parent).weights["model.safetensors"]
    record.write_text(record.read_text().replace(weights, "0" * 64))
    assert [record.stage for record in read_account(tmp_path / "run" / "logits").stages] == ["logits"]


@pytest.mark.parametrize(
    ("path", "name"),
    [("org/teacher-1b", "org/teacher-1b"), ("/hub/models--org--teacher-1b/snapshots/0123", "org/teacher-1b")],
)
def test_a_teacher_of_the_hub_is_the_base_model(tmp_path, path, name):
    student = make_run(tmp_path / "run", teacher_path=path, last="convert")
    card = card_of(student, tmp_path / "out", n_bytes=1)
    assert (card.data.base_model, card.data.base_model_relation) == (name, "finetune")
    assert f"[{name}](https://huggingface.co/{name})" in card.content
    assert "snapshots" not in card.content


def test_what_the_teachers_own_card_says_is_taken_over(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlanguage: [en, de]\n---\n# T\n")
    student = make_run(tmp_path / "run", teacher_path=str(teacher), last="convert")
    data = card_of(student, tmp_path / "out", base_model="org/really", n_bytes=1).data
    assert (data.license, data.license_name, data.language) == ("other", "own", ["en", "de"])
    assert data.base_model == "org/really", "what the user says is right"


def test_what_quantising_cost_stands_in_it(run, tmp_path):
    cost = Quantised("int8 weight-only (torchao)", "text.txt", 480, 2.25, 2.2512, 3e-4, 0.991, 4096, 1024)
    card = card_of(run / "logits", tmp_path, n_bytes=1024, quantised=cost)
    assert "weight files 4 KiB → 1 KiB" in card.content
    assert "perplexity 9.4877 → 9.4991 (loss 2.2500 → 2.2512), KL 3.00e-04" in card.content
    assert {"int8", "torchao"} <= set(card.data.tags)


def test_each_format_says_how_it_is_loaded(run, tmp_path):
    told = {name: card_of(run / "logits", tmp_path, format=name, n_bytes=1, file="made.gguf").content
            for name in ("standalone", "granite", "bamba", "gguf")}  # fmt: skip
    assert [name for name, text in told.items() if "trust_remote_code=True)" in text] == ["standalone"]
    assert "vllm serve org/made" in told["granite"]
    assert "llama-cli -m made.gguf" in told["gguf"]


@pytest.mark.parametrize(("family", "served"), [("llama", True), ("mistral", False)])
def test_vllm_is_named_where_it_loads_the_model(tmp_path, family, served):
    """Mistral's four heads of 12 channels are wider than a model of 32, which vLLM does not know."""
    convert(tiny(family), keep_attention=[1]).save_pretrained(tmp_path / "student")
    text = card_of(tmp_path / "student", tmp_path / "card", format="granite", n_bytes=1).content
    assert ("vllm serve org/made" in text) is served
    assert ("vLLM does not load it: it takes hidden size / heads" in text) is not served


@pytest.mark.parametrize("keep", [(), (1,), range(3)], ids=str)
def test_what_is_remembered_is_what_a_cache_holds(family, keep):
    """Computed from the config against the bytes of a cache that was filled."""
    teacher = tiny(family)
    student = convert(teacher, keep_attention=keep)
    ids = torch.arange(3, 43)[None]
    footprint = footprint_of(student.config)
    assert footprint.student_bytes(40) == cache_nbytes(student(ids, use_cache=True).past_key_values)
    assert footprint.teacher_bytes(40) == cache_nbytes(teacher(ids, use_cache=True).past_key_values)
    assert footprint.parameters == sum(parameter.numel() for parameter in student.parameters())


def test_a_sliding_window_ends_what_attention_remembers_and_does():
    far, near = AttentionCost(10, 3, None), AttentionCost(10, 3, 8)
    layers = Footprint(0, state_bytes=100, scan_operations=7, layers=(far, near, far), kept=(1, 2))
    assert layers.student_bytes(20) == 100 + 10 * (8 + 20)
    assert layers.teacher_bytes(20) == 10 * (20 + 8 + 20)
    assert layers.student_operations(20) == 7 + 3 * 28
    assert layers.teacher_operations(5) == 3 * 15
    mistral = MistralConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=97, sliding_window=16
    )
    student = student_config(mistral, ["attention", "mamba2"], {"n_heads": 4, "head_dim": 8, "state_dim": 8})
    assert [layer.window for layer in footprint_of(student).layers] == [16, 16]


def test_layers_behind_a_window_have_a_row_of_their_own(tmp_path):
    student = convert(tiny("llama"), mixer="based", window_layers=[1], window=5, sinks=2)
    student.save_pretrained(tmp_path / "student")
    card = card_of(tmp_path / "student", tmp_path / "card", n_bytes=10)
    assert "all of its 3 layers are BASED and sliding-window attention layers" in card.content
    assert "| a mixer | 4 heads of 8 channels × 8 states |" in card.content
    assert "| a window | 4 heads of 8 channels × the first 2 and the last 5 tokens |" in card.content
    assert {"based", "linear-attention", "sliding-window-attention", "hybrid"} <= set(card.data.tags)
