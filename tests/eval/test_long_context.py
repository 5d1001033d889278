"""eval.long_context on saved tiny models and real files: what it writes, its section, and what it refuses."""

import json
import shutil

import pytest
import torch
from synthetic_run import characters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from distill import convert
from distill.by_position import losses
from eval import long_context
from eval.findings import read_findings
from eval.sections import SECTIONS
from tests.conftest import SHAPE


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), characters()
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    teacher = LlamaForCausalLM(LlamaConfig(**shape))
    learned = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2)
    made = {"teacher": teacher, "mamba": convert(teacher, keep_attention=[]), "learned": GPT2LMHeadModel(learned)}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: (str(folder / name), model.eval()) for name, model in made.items()}


@pytest.fixture
def texts(tmp_path):
    """Three modules of Python's own, as long as they come, and a short one."""
    source = tmp_path / "texts"
    source.mkdir()
    for module in (json, json.decoder, json.encoder):
        shutil.copy(module.__file__, source / f"{module.__name__}.txt")
    (source / "a.txt").write_text("short")
    return source


def test_losses_side_by_side(models, texts, tmp_path, capsys):
    paths = [path for path, _ in models.values()]
    long_context.main(
        paths, [str(texts)], trained=32, up_to=4, documents=2, chunk=48, output=tmp_path / "out", device="cpu"
    )
    found = read_findings(tmp_path / "out" / "long_context.json")
    assert list(found.models) == list(models)
    assert found.settings["documents"] == ["json.decoder.txt", "json.encoder.txt"]
    tokenizer = characters()
    ids = [tokenizer((texts / name).read_text())["input_ids"] for name in found.settings["documents"]]
    for name in ("teacher", "mamba"):
        buckets = found.results[name]["buckets"]
        assert [bucket["to"] for bucket in buckets] == [16, 23, 32, 45, 64, 91, 128]
        expected = [losses(models[name][1], one[:129])[91:128].mean() for one in ids]
        assert buckets[-1]["loss"] == pytest.approx(float(sum(expected) / 2), rel=1e-5)
        assert [context for context, _ in found.results[name]["by_context"]] == [4, 8, 16, 32, 64, 96]
    assert found.results["learned"]["limit"] == 64
    assert [bucket["to"] for bucket in found.results["learned"]["buckets"]] == [16, 23, 32, 45, 64]
    assert found.results["learned"]["by_context"][-1][0] == 32
    assert "learned: knows 64 positions and cannot read further" in capsys.readouterr().out

    section = SECTIONS["long_context"](found)
    assert "Beyond the 32 tokens trained on, teacher goes from " in section.lead
    assert "learned knows 64 positions." in section.lead
    assert section.tables[0].rows[-1][0] == "128"
    assert section.tables[0].rows[-1][3] == "–"
    assert all("trained on" in {series.label for series in chart.legend} for chart in section.figures)


def test_documents_that_are_too_short(models, texts, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        long_context.main([models["teacher"][0]], [str(texts)], trained=4096, output=tmp_path / "out", device="cpu")
    assert end.value.code == 2
    size = len(characters()((texts / "json.encoder.txt").read_text())["input_ids"])
    said = capsys.readouterr().err
    assert f"no document of the text has 65,537 tokens; the longest, json.encoder.txt, has {size:,}" in said
    assert not (tmp_path / "out").exists()
