"""Students as checkpoints of transformers' own classes: what those compute is what the student computes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BambaForCausalLM,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from distill import UserError, convert
from distill.export import limits, names, native
from distill.export.exporting import export_folder
from distill.export.formats import Options
from distill.export.weights import Rule

CLASSES = {"granite": GraniteMoeHybridForCausalLM, "bamba": BambaForCausalLM}
TO = sorted(CLASSES)


def exported(student: PreTrainedModel, tmp_path: Path, to: str) -> PreTrainedModel:
    student.save_pretrained(tmp_path / "student")
    report = export_folder(tmp_path / "student", tmp_path / to, to=to, options=Options())
    assert any(line.startswith("verified in fp32") for line in report)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / to)
    assert type(model) is CLASSES[to]
    assert "auto_map" not in json.loads((tmp_path / to / "config.json").read_text())
    assert not list((tmp_path / to).glob("*.py"))
    return model.eval()


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max().clamp_min(1)))


@pytest.mark.parametrize("to", TO)
@torch.inference_mode()
def test_native_class_equals_student(
    tiny_model: Callable[..., PreTrainedModel], family: str, to: str, tmp_path: Path
) -> None:
    student = convert(tiny_model(family), keep_attention=[1])
    model = exported(student, tmp_path, to)
    ids_BT = torch.randint(3, 97, (2, 70))
    near(student(ids_BT, use_cache=False).logits, model(ids_BT, use_cache=False).logits)

    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :9] = 0
    batch = {"input_ids": ids_BT.masked_fill(mask_BT == 0, 0), "attention_mask": mask_BT}
    kind = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = student.generate(**batch, **kind), model.generate(**batch, **kind)
    assert torch.equal(ours.sequences, theirs.sequences)
    near(torch.stack(ours.logits), torch.stack(theirs.logits))
    uncached = model.generate(**batch, **kind, use_cache=False)
    assert torch.equal(theirs.sequences, uncached.sequences)
    alone = model.generate(ids_BT[:1, 9:], **kind)
    assert torch.equal(alone.sequences[0, -8:], theirs.sequences[0, -8:])


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize(
    ("changes", "settings", "width"),
    [
        pytest.param({"rope_parameters": LLAMA3}, {}, 32, id="llama3-rope"),
        pytest.param({"attention_bias": True}, {"state_dim": 5, "conv_width": 2}, 32, id="biases-everywhere"),
        # Four heads of 24 channels are as wide as three times the model; of 12, they need four more heads for that.
        pytest.param({"head_dim": 24, "tie_word_embeddings": True}, {"conv_width": 1}, 96, id="wide-heads"),
        pytest.param({"head_dim": 12}, {}, 96, id="heads-added"),
        pytest.param({}, {"expand": 2}, 64, id="copies"),
    ],
)
def test_what_else_the_classes_can_say(changes: dict, settings: dict, width: int, to: str, tmp_path: Path) -> None:
    model = exported(convert(llama(**changes), keep_attention=[1], **settings), tmp_path, to)
    mixer = model.get_decoder().layers[0].mamba
    assert mixer.out_proj.in_features == width
    assert mixer.chunk_size == 64


def test_fused_matrices_come_apart(random_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    exported(convert(random_teacher("phi3"), keep_attention=[1]), tmp_path, "bamba")


def test_gemma_is_exact_with_all_its_attention(random_teacher: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    student = convert(random_teacher("gemma", head_dim=12).bfloat16(), keep_attention=[0, 1, 2])
    exported(student, tmp_path, "granite")


def test_bamba_says_mlp_biases_and_granite_refuses_them(tmp_path: Path) -> None:
    student = convert(llama(mlp_bias=True), keep_attention=[1])
    exported(student, tmp_path, "bamba")
    with pytest.raises(UserError, match=r"layers 0, 1: an MLP with biases \(mlp.gate_proj.bias\); no recipe setting"):
        export_folder(tmp_path / "student", tmp_path / "granite", to="granite", options=Options())
    assert not (tmp_path / "granite").exists()


def test_weights_keep_their_dtype_and_go_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(llama(), keep_attention=[1]).bfloat16().save_pretrained(tmp_path / "student")
    write = native.write_shards
    monkeypatch.setattr(native, "write_shards", lambda tensors, folder: write(tensors, folder, shard_bytes=20_000))
    export_folder(tmp_path / "student", tmp_path / "out", to="granite", options=Options())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_wrong_table_is_noticed_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(rule: Rule) -> Rule:
        return Rule(rule.ours[::-1], rule.theirs, rule.change) if len(rule.ours) == 2 else rule

    convert(llama(), keep_attention=[1]).save_pretrained(tmp_path / "student")
    table = tuple(map(swapped, names.granite(norm_plus_one=False)))
    monkeypatch.setattr(limits.names, "granite", lambda **_: table)
    with pytest.raises(UserError, match="so it was not kept"):
        export_folder(tmp_path / "student", tmp_path / "out", to="granite", options=Options())
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    report = export_folder(tmp_path / "student", tmp_path / "out", to="granite", options=Options(verify=False))
    assert "not verified" in report


def test_lost_weights_are_named(tmp_path: Path) -> None:
    convert(llama(), keep_attention=[1]).save_pretrained(tmp_path / "student")
    weights = load_file(tmp_path / "student" / "model.safetensors")
    del weights["model.layers.0.self_attn.A_log"], weights["model.layers.0.self_attn.D"]
    save_file(weights, tmp_path / "student" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of its model: model.layers.0.self_attn.\w+ and 1 more"):
        export_folder(tmp_path / "student", tmp_path / "out", to="granite", options=Options())


def test_only_students_are_exported(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="holds a llama model, not a student"):
        export_folder(tmp_path / "teacher", tmp_path / "out", to="granite", options=Options())
    with pytest.raises(UserError, match="--to is 'onnx'; allowed are granite, bamba, gguf"):
        export_folder(tmp_path / "teacher", tmp_path / "out", to="onnx", options=Options())
    assert not (tmp_path / "out").exists()
