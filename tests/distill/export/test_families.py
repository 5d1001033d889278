"""The table of docs/families.md: which families' hybrids transformers' own class and llama.cpp run.

A case that the refusals let through is exported, and what runs it must compute what the student does; any other must
be refused by them before anything is written.
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill import UserError, convert
from distill.export.exporting import export_folder
from distill.export.facts import facts_of
from distill.export.formats import Options
from distill.export.limits import LIMITS
from distill.export.refusals import refusals
from tests.distill.export.llama_cpp_server import INSTALLED, REASON, complete
from tests.distill.families.models import EVERY, built

# Windows and partial rotations are refused everywhere, and a family has checkpoints without them. llama.cpp wants heads
# that divide twice the hidden size, and the tokenizer at hand has 512 tokens.
_NO_WINDOW = {"sliding_window": None}
_CHANGES: dict[str, dict[str, Any]] = {
    "Mistral": {**_NO_WINDOW, "head_dim": 8},
    "Mixtral": _NO_WINDOW,
    "Phi-3": {**_NO_WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


@functools.cache
def student_of(case: str) -> PreTrainedModel:
    model_type, settings = EVERY[case]
    changed = {**settings, **_CHANGES.get(case, {}), "vocab_size": 512, "num_hidden_layers": 2}
    for name in ("layer_types", "no_rope_layers"):  # of the first two layers
        if name in changed:
            changed[name] = changed[name][:2]
    return convert(built(model_type, changed), keep_attention=[1])


def exported(case: str, to: str, tokenizer: Path, tmp_path: Path, record_property: Any) -> PreTrainedModel | None:
    """The student, written to ``tmp_path / to``; None where it is refused, as it then must be."""
    student = student_of(case)
    student.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path / "student")
    if refusals(facts_of(student.config), LIMITS[to]):
        record_property("support", "no")
        with pytest.raises(UserError, match="cannot say this student"):
            export_folder(tmp_path / "student", tmp_path / to, to=to, options=Options())
        assert not (tmp_path / to).exists()
        return None
    export_folder(tmp_path / "student", tmp_path / to, to=to, options=Options(outtype="f32"))
    return student


@pytest.mark.support("native export")
@pytest.mark.parametrize("case", EVERY)
@torch.inference_mode()
def test_granite_computes_the_same(case: str, stories_teacher: Path, tmp_path: Path, record_property: Any) -> None:
    student = exported(case, "granite", stories_teacher, tmp_path, record_property)
    if student is not None:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "granite").eval()
        ids_BT = torch.randint(3, 512, (2, 70), generator=torch.Generator().manual_seed(0))
        ours_BTV, theirs_BTV = (each(ids_BT, use_cache=False).logits for each in (student, model))
        torch.testing.assert_close(theirs_BTV, ours_BTV, rtol=0, atol=1e-5 * float(ours_BTV.abs().max().clamp_min(1)))


@pytest.mark.skipif(find_spec("gguf") is None, reason="pip install 'distill-ssm[gguf]'")
@pytest.mark.skipif(not INSTALLED, reason=REASON)
@pytest.mark.support("GGUF")
@pytest.mark.parametrize("case", EVERY)
@torch.inference_mode()
def test_llama_cpp_computes_the_same(case: str, stories_teacher: Path, tmp_path: Path, record_property: Any) -> None:
    student = exported(case, "gguf", stories_teacher, tmp_path, record_property)
    if student is not None:
        ids = torch.randint(259, 512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
        expected_TV = student(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        # A prompt of several tokens is one scan, the token after it one step.
        prompts: list[str | list[int]] = [ids[:n] for n in (1, 17, 40)]
        answers = complete(tmp_path / "gguf" / "model-f32.gguf", prompts, 1, 512, forced=300)
        for prompt, answer in zip(prompts, answers, strict=True):
            got_V = torch.tensor([answer["logprobs"][0][str(number)] for number in range(512)])
            torch.testing.assert_close(got_V, expected_TV[len(prompt) - 1], rtol=0, atol=1e-4)
