"""One student, every format: the same story, token for token, in processes that know nothing of this package."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from distill import load_student
from distill.checks import check
from distill.converting import convert_folder
from distill.export.exporting import export_folder
from distill.export.formats import FORMATS, Options
from distill.recipe import load_recipe
from tests.distill.export.llama_cpp_server import INSTALLED, REASON, complete

PROMPT, NEW_TOKENS = "Once upon a time", 48

RECIPE = """
teacher: {{path: {teacher}}}
student: {{keep_attention: [2], exportable: granite}}
data: {{source: {text}, block: 64}}
stages: {{logits: {{tokens: 10K}}}}
"""

STRANGER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt, new_tokens, folders = json.loads(sys.stdin.read())
stories = []
for folder in folders:
    trust = folder.endswith("standalone")  # the tokenizer is a stock one, and reads the config all the same
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    ids = tokenizer(prompt, return_tensors="pt")
    stories.append(model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)[0].tolist())
assert not any(name.split(".")[0] == "distill" for name in sys.modules)
print(json.dumps(stories))
"""


@pytest.fixture(scope="module")
def student(stories_teacher: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid whose recipe says that granite must be able to say it."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "recipe.yaml").write_text(RECIPE.format(teacher=stories_teacher, text=stories_text))
    recipe = load_recipe(folder / "recipe.yaml", [f"run_dir={folder / 'run'}"])
    kept = check(recipe).kept
    keep = ",".join(map(str, kept))
    convert_folder(str(stories_teacher), folder / "student", mixer="mamba2", keep=keep, seed=0, overwrite=False)
    return folder / "student"


@pytest.fixture(scope="module")
def story(student: Path) -> list[int]:
    ids_BT = AutoTokenizer.from_pretrained(student)(PROMPT, return_tensors="pt")["input_ids"]
    told = load_student(student).eval().generate(ids_BT, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    assert len(set(told)) > 20, "a story that repeats itself shows little"
    return told


@pytest.mark.slow  # a fresh process that imports transformers
def test_classes_of_transformers_tell_the_same_story(student: Path, story: list[int], tmp_path: Path) -> None:
    formats = [to for to in FORMATS if to != "gguf"]
    for to in formats:
        export_folder(student, tmp_path / to, to=to, options=Options())
    request = json.dumps([PROMPT, NEW_TOKENS, [str(tmp_path / to) for to in formats]])
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER]
    done = subprocess.run(command, input=request, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    stories = json.loads(done.stdout.splitlines()[-1])
    assert dict(zip(formats, stories, strict=True)) == dict.fromkeys(formats, story)


@pytest.mark.skipif(find_spec("gguf") is None, reason="pip install 'distill-ssm[gguf]'")
@pytest.mark.skipif(not INSTALLED, reason=REASON)
def test_llama_cpp_tells_the_same_story(student: Path, story: list[int], tmp_path: Path) -> None:
    export_folder(student, tmp_path / "gguf", to="gguf", options=Options(outtype="f32"))
    (answer,) = complete(tmp_path / "gguf" / "model-f32.gguf", [PROMPT], NEW_TOKENS, 512)
    # From the text on: llama.cpp has read the tokenizer from the file too.
    assert answer["n_prompt"] == len(story) - NEW_TOKENS
    assert answer["tokens"] == story[-NEW_TOKENS:]
    with torch.inference_mode():
        logits = load_student(student)(torch.tensor([story]), use_cache=False).logits[0, answer["n_prompt"] - 1 : -1]
    theirs = [[step[str(number)] for number in range(512)] for step in answer["logprobs"]]
    torch.testing.assert_close(torch.tensor(theirs), logits.log_softmax(-1), rtol=0, atol=2e-4)


@pytest.mark.skipif(find_spec("gguf") is None, reason="pip install 'distill-ssm[gguf]'")
@pytest.mark.skipif(not INSTALLED, reason=REASON)
@pytest.mark.parametrize("teacher", ["stories", "stdlib"])
def test_llama_cpp_cuts_text_alike(
    stories_teacher: Path, stdlib_teacher: Path, stories_text: Path, teacher: str, tmp_path: Path
) -> None:
    """SentencePiece by scores, and byte-level BPE by merges: as many tokens of each text as Hugging Face has."""
    source = {"stories": stories_teacher, "stdlib": stdlib_teacher}[teacher]
    convert_folder(str(source), tmp_path / "student", mixer="mamba2", keep="0", seed=0, overwrite=False)
    export_folder(tmp_path / "student", tmp_path / "out", to="gguf", options=Options(outtype="q8_0"))
    paragraphs = stories_text.read_text(encoding="utf-8").split("\n")[:40]
    code = Path(json.__file__).read_text(encoding="utf-8").split("\n\n")[:20]
    odd = ["  two blanks", "naïve café — 日本 🙂", "x=1234567; y = 'it''s'\n\t\treturn", "a\n\n\nb"]
    prompts: list[str | list[int]] = [text[:200] for text in [*paragraphs, *code, *odd] if text.strip()]
    answers = complete(tmp_path / "out" / "model-q8_0.gguf", prompts, 1, 1, forced=300)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert [answer["n_prompt"] for answer in answers] == [len(tokenizer(text)["input_ids"]) for text in prompts]
