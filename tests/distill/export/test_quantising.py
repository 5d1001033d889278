"""Linear layers in int8: which, what it costs, and that the folder loads as what was measured."""

import sys

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModelForCausalLM

from distill import convert
from distill.errors import UserError
from distill.evaluation import evaluate
from distill.export.account import read_account
from distill.export.exporting import export_folder
from distill.export.formats import Options
from distill.export.held_out import measured_text
from distill.export.quantising import check_quantise
from distill.export.standalone import load_by_own_code
from distill.student import load_model, load_student
from tests.conftest import tiny
from tests.distill.export.made_run import make_run

INT8 = Options(quantise="int8")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def quantised(student, tmp_path_factory):
    """The exported folder and what was told."""
    pytest.importorskip("torchao", reason="torchao is not installed (pip install 'distill-ssm[quantise]')")
    out = tmp_path_factory.mktemp("exported") / "made"
    return out, export_folder(student, out, to="standalone", options=INT8)


def test_linear_layers_are_int8_and_nothing_else(quantised):
    model = load_student(quantised[0])
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    int8 = {name for name, parameter in model.named_parameters() if type(parameter.data).__name__ == "Int8Tensor"}
    assert int8 == linear - {"lm_head.weight"}
    assert {"model.layers.0.self_attn.in_proj.weight", "model.layers.1.self_attn.q_proj.weight"} < int8
    rest = {parameter.dtype for name, parameter in model.named_parameters() if name not in int8}
    assert rest == {torch.float32}


def test_the_cost_is_that_of_the_saved_folder(student, quantised):
    """What was told and written, against both folders loaded anew and compared."""
    out, lines = quantised
    text = measured_text(student, read_account(student), None)
    metrics = evaluate(load_model(out), load_model(student), text.batches)
    assert metrics.kl > 0
    told = next(line for line in lines if line.startswith("perplexity"))
    assert f"(loss {metrics.teacher_loss:.4f} → {metrics.loss:.4f}), KL {metrics.kl:.2e}" in told
    assert told in ModelCard.load(out / "README.md").content
    assert (out / "model.safetensors").stat().st_size < (student / "model.safetensors").stat().st_size


def test_the_folders_own_code_takes_them(quantised):
    ids = torch.arange(3, 25)[None]
    assert torch.equal(load_by_own_code(quantised[0])(ids).logits, load_student(quantised[0])(ids).logits)


def test_decoding_step_by_step_is_prefill(quantised):
    model = load_student(quantised[0])
    ids = torch.randint(3, 900, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = model(ids, use_cache=False).logits
    cache, got = None, []
    for piece in ids.split([7, 1, 1, 2], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-5, atol=1e-5)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_a_native_class_takes_them_too(student, quantised, tmp_path):
    lines = export_folder(student, tmp_path / "granite", to="granite", options=INT8)
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "granite")
    assert type(native).__name__ == "GraniteMoeHybridForCausalLM"
    ids = torch.arange(3, 25)[None]
    torch.testing.assert_close(native(ids).logits, load_student(quantised[0])(ids).logits, rtol=1e-2, atol=1e-2)
    assert any(line.startswith("int8 weight-only") for line in lines)


def test_a_head_of_its_own_stays(quantised, tmp_path):
    """Qwen2's is not tied here."""
    from distill.export.quantising import _quantised

    convert(tiny("qwen2")).save_pretrained(tmp_path)
    model = _quantised(tmp_path)
    assert type(model.lm_head.weight) is nn.Parameter
    assert type(model.model.layers[0].mlp.up_proj.weight.data).__name__ == "Int8Tensor"


def test_a_text_of_the_users_own(student, quantised, tmp_path):
    (tmp_path / "own.txt").write_text("def write(self, text):\n    self.buffer += text\n" * 20)
    options = Options(quantise="int8", eval_text=tmp_path / "own.txt", verify=False)
    lines = export_folder(student, tmp_path / "out", to="standalone", options=options)
    assert any(line.endswith("tokens of own.txt") for line in lines)


def test_what_cannot_be_done_is_said_first(student, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="allowed is int8"):
        check_quantise("int3", "standalone")
    with pytest.raises(UserError, match="gguf has --outtype"):
        check_quantise("int8", "gguf")
    with pytest.raises(UserError, match="no such file"):
        measured_text(student, read_account(student), tmp_path / "none.txt")
    convert(tiny("llama")).save_pretrained(tmp_path / "alone")
    with pytest.raises(UserError, match="give --eval-text FILE"):
        measured_text(tmp_path / "alone", read_account(tmp_path / "alone"), None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"needs torchao .* pip install 'distill-ssm\[quantise\]'"):
        check_quantise("int8", "standalone")
