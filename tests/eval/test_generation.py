"""eval.generation on saved tiny models and a real file: what it writes, its section, and what it refuses."""

import json

import pytest
import torch
from synthetic_run import characters
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from distill import convert
from distill.continuing import continued, greedily
from eval import generation
from eval.cuts import cuts
from eval.findings import read_findings
from eval.sections import SECTIONS
from tests.conftest import SHAPE

ASKED = {"prompts": 5, "prompt_tokens": 12, "new_tokens": 8, "sample_tokens": 20, "seed": 3, "device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), characters()
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)}))
    teacher.generation_config.eos_token_id = None
    learned = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=1, n_head=2)
    made = {"teacher": teacher, "mamba": convert(teacher, keep_attention=[]), "learned": GPT2LMHeadModel(learned)}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}, teacher.eval()


def test_teacher_and_student_side_by_side(models, tmp_path, capsys):
    paths, teacher = models
    generation.main([paths["teacher"], paths["mamba"]], [json.__file__], output=tmp_path, **ASKED)
    found = read_findings(tmp_path / "generation.json")
    given = cuts([json.__file__], characters(), 12, 20, 5, 3)
    assert len(given) == 5
    rows = found.results["continued"]
    assert [row["tokens"] for row in rows["mamba"]] == [1, 4, 8]
    assert [row["same"] for row in rows["teacher"]] == [1, 1, 1]
    expected = continued(teacher, given, greedily(teacher, given, 8, 4), [8], seed=3, batch_size=4)[0]
    assert rows["teacher"][-1]["preferred"] == expected.preferred
    assert rows["teacher"][-1]["log_probability"] == pytest.approx(expected.log_probability, rel=1e-5)
    repetition = found.results["repetition"]
    assert list(repetition) == ["the text itself", "teacher", "mamba"]
    assert repetition["teacher"]["tokens"] == 20
    assert 0 < repetition["the text itself"]["distinct"]["1"] < repetition["the text itself"]["distinct"]["3"] <= 1
    assert "samples repeat" in capsys.readouterr().out

    section = SECTIONS["generation"](found)
    assert section.lead.startswith("Over the next token, mamba prefers the text ")
    assert len(section.quotes) == 3 * 3
    assert section.quotes[0].prompt == characters().decode(given[0].prompt, skip_special_tokens=True)
    assert [row[:2] for row in section.tables[0].rows][:3] == [["teacher", "1"], ["teacher", "4"], ["teacher", "8"]]
    (chart,) = section.figures
    assert {"mamba, preferred", "mamba, written"} <= {series.label for series in chart.legend}


def test_prompts_are_stretches_of_the_text():
    tokenizer = characters()
    whole = tokenizer(open(json.__file__).read(), add_special_tokens=False)["input_ids"]  # noqa: SIM115
    given = cuts([json.__file__], tokenizer, 12, 20, 6, 0)
    for cut in given:
        ids = [*cut.prompt[len(cut.prompt) - 12 :], *cut.after]
        assert any(whole[at : at + 32] == ids for at in range(len(whole)))
    assert given != cuts([json.__file__], tokenizer, 12, 20, 6, 1)


def test_mistakes_are_told(models, tmp_path, capsys):
    paths, out = models[0], tmp_path / "none"
    (tmp_path / "short.txt").write_text("short")
    for model, text, told in (
        ("teacher", tmp_path / "short.txt", "has 0 stretches of 12 + 20 tokens"),
        ("learned", json.__file__, "more than the 32 positions"),
    ):
        with pytest.raises(SystemExit) as end:
            generation.main([paths[model]], [str(text)], output=out, **ASKED)
        assert end.value.code == 2
        assert told in capsys.readouterr().err
    assert not out.exists()
