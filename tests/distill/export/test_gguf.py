"""A student as a GGUF file: what it says, and what llama.cpp computes from it where it is installed."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from distill import UserError, convert
from distill.export.exporting import export_folder
from distill.export.formats import Options
from tests.distill.export.llama_cpp_server import INSTALLED, REASON, complete

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="pip install 'distill-ssm[gguf]'")
needs_llama_cpp = pytest.mark.skipif(not INSTALLED, reason=REASON)

ROPE = {"rope_theta": 500.0}
LLAMA3 = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {"vocab_size": 512, "hidden_size": 64, "pad_token_id": None, "head_dim": 16}
TEACHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}, {"state_dim": 24}),
    "linear-rope": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}, {"conv_width": 2}),
    # Its matrices end within a block of rows, whatever the block; the tokenizer has 512 tokens.
    "odd-vocabulary": ("llama", {"vocab_size": 517}, {}),
}


def written(student: PreTrainedModel, tokenizer: Path, tmp_path: Path, outtype: str = "f32") -> Path:
    student.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "student")
    export_folder(tmp_path / "student", tmp_path / "out", to="gguf", options=Options(outtype=outtype))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", f"model-{outtype}.gguf"}
    return tmp_path / "out" / f"model-{outtype}.gguf"


def read(file: Path) -> SimpleNamespace:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return SimpleNamespace(fields=fields, tensors={tensor.name: tensor for tensor in reader.tensors})


@needs_gguf
@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_what_the_file_says(stories_teacher: Path, tmp_path: Path, outtype: str) -> None:
    student = convert(stories_teacher, keep_attention=[2])
    file = read(written(student, stories_teacher, tmp_path, outtype))
    said = {name.removeprefix("granitehybrid."): value for name, value in file.fields.items()}
    assert said["general.architecture"] == "granitehybrid"
    assert said["attention.head_count_kv"] == [0, 0, 4, 0, 0]
    assert said["ssm.inner_size"] == 2 * said["embedding_length"] == 128
    assert said["ssm.time_step_rank"] == said["ssm.group_count"] == 16
    assert said["rope.scaling.finetuned"] is True
    assert said["tokenizer.ggml.model"] == "llama"
    assert len(said["tokenizer.ggml.tokens"]) == 512

    kinds = {name: tensor.tensor_type.name for name, tensor in file.tensors.items()}
    wanted = outtype.upper()
    assert kinds["blk.2.attn_q.weight"] == kinds["blk.0.ssm_in.weight"] == kinds["token_embd.weight"] == wanted
    assert kinds["blk.0.ssm_conv1d.weight"] == kinds["blk.0.ssm_a"] == kinds["blk.0.ssm_norm.weight"] == "F32"
    # 172 numbers a row are no whole number of blocks.
    assert kinds["blk.0.ffn_down.weight"] == ("F16" if outtype == "q8_0" else wanted)
    assert "output.weight" not in kinds  # tied
    mixer = student.model.layers[0].self_attn
    rate_H1 = torch.from_numpy(file.tensors["blk.0.ssm_a"].data.copy())
    torch.testing.assert_close(rate_H1[:8, 0], -mixer.A_log.exp())
    down = torch.tensor(file.tensors["blk.0.ffn_down.weight"].data.astype("float32"))
    torch.testing.assert_close(down, student.model.layers[0].mlp.down_proj.weight, rtol=0, atol=1e-3)


@needs_gguf
def test_state_may_be_padded_for_cuda(stories_teacher: Path, tmp_path: Path) -> None:
    student = convert(stories_teacher, keep_attention=[2])
    student.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(stories_teacher).save_pretrained(tmp_path / "student")
    export_folder(tmp_path / "student", tmp_path / "out", to="gguf", options=Options(outtype="f32", state=128))
    file = read(tmp_path / "out" / "model-f32.gguf")
    assert file.fields["granitehybrid.ssm.state_size"] == 128
    assert list(file.tensors["blk.0.ssm_conv1d.weight"].shape) == [4, 128 + 2 * 16 * 128]
    with pytest.raises(UserError, match="--state is 4; the mixers have 8 numbers of state, which cannot be cut off"):
        export_folder(tmp_path / "student", tmp_path / "less", to="gguf", options=Options(state=4))


@needs_gguf
def test_what_gguf_needs_is_said(stories_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(stories_teacher, keep_attention=[2]).save_pretrained(tmp_path / "student")
    with pytest.raises(UserError, match="has no tokenizer, which a GGUF file must hold"):
        export_folder(tmp_path / "student", tmp_path / "out", to="gguf", options=Options())
    with pytest.raises(UserError, match="--outtype is 'q4'; allowed are f32, f16, q8_0"):
        export_folder(tmp_path / "student", tmp_path / "out", to="gguf", options=Options(outtype="q4"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'distill-ssm\[gguf\]'"):
        export_folder(tmp_path / "student", tmp_path / "out", to="gguf", options=Options())
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@needs_gguf
@needs_llama_cpp
@pytest.mark.parametrize("teacher", sorted(TEACHERS))
@torch.inference_mode()
def test_llama_cpp_computes_the_same(
    random_teacher: Callable[..., PreTrainedModel], stories_teacher: Path, teacher: str, tmp_path: Path
) -> None:
    model_type, settings, mixers = TEACHERS[teacher]
    student = convert(random_teacher(model_type, **{**SIZES, **settings}), keep_attention=[1], **mixers)
    file = written(student, stories_teacher, tmp_path)
    ids = torch.randint(259, 512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = student(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    size = student.config.vocab_size
    # A prompt of several tokens is one scan; the tokens after it come step by step.
    prompts: list[str | list[int]] = [ids[:n] for n in (1, 17, 40)]
    for prompt, answer in zip(prompts, complete(file, prompts, 1, size, forced=300), strict=True):
        theirs = {int(number): value for number, value in answer["logprobs"][0].items()}
        assert len(theirs) == size
        got = torch.tensor([theirs[number] for number in range(size)])
        torch.testing.assert_close(got, expected[len(prompt) - 1], rtol=0, atol=1e-4)
