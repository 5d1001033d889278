"""A student's folder with its own code: only what the student needs, noticed when mixed up, loads without us."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from distill import convert, load_student
from distill.mixers import MIXERS
from tests.conftest import tiny
from tests.distill.families.models import CASES
from tests.distill.families.models import tiny as tiny_case

LETTERS = torch.arange(3, 25).reshape(2, 11)


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """Loads a folder by the code in it, though this package would know it; transformers copies the code first."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", [str(cache), *sys.path])
    before = set(sys.modules)

    def load(folder, **kwargs):
        name = json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
        return dynamic_module_utils.get_class_from_dynamic_module(name, folder).from_pretrained(folder, **kwargs)

    yield load
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


@pytest.fixture
def saved(tmp_path):
    """A hybrid and its folder."""
    student = convert(tiny("llama"), keep_attention=[1])
    student.save_pretrained(tmp_path / "student")
    return student, tmp_path / "student"


def code_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_the_code_is_what_this_student_needs_and_says_where_it_is_from(tmp_path):
    for mixer, other in (("mamba2", "Discrete"), ("discrete_mamba2", "class Mamba2Mixer")):
        convert(tiny("qwen2"), mixer=mixer).save_pretrained(tmp_path / mixer)
        code = code_in(tmp_path / mixer)
        whole = "\n".join(code.values())
        assert other not in whole
        assert "Llama" not in code["modeling_distilled_qwen2.py"]
        assert not {"distill_attention.py", "distill_student.py", "distill_standalone.py"} & code.keys()
        assert "import distill" not in whole
        assert "from distill" not in whole
        for name, text in code.items():
            assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n# Written by distill-ssm "), name
        assert ", distill/ssd/tiled.py.\n" in code["distill_ssd_tiled.py"]


def test_a_student_without_mixers_has_its_code_too(tmp_path, own_code):
    student = convert(tiny("llama"), keep_attention=range(3))
    student.save_pretrained(tmp_path / "student")
    assert torch.equal(own_code(tmp_path / "student")(LETTERS).logits, student(LETTERS).logits)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_the_folders_own_code_is_the_same_model_and_saves_itself_again(tmp_path, family, mixer, own_code):
    student = convert(tiny(family), mixer=mixer, keep_attention=[1])
    first, second = tmp_path / "first", tmp_path / "second"
    student.save_pretrained(first)
    loaded = own_code(first)
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert torch.equal(loaded(LETTERS).logits, student(LETTERS).logits)
    written = loaded.config.auto_map
    del loaded.config.auto_map  # as in a config that was made, not loaded
    loaded.save_pretrained(second)
    assert json.loads((second / "config.json").read_text())["auto_map"] == written
    assert code_in(second) == code_in(first)
    shutil.rmtree(first)
    for again in (own_code(second), load_student(second)):
        assert torch.equal(again(LETTERS).logits, student(LETTERS).logits)


def test_kept_heads_travel_with_the_folder(tmp_path, family, own_code):
    student = convert(tiny(family), keep_heads={0: [1], 2: [0, 3]})
    student.save_pretrained(tmp_path / "student")
    loaded = own_code(tmp_path / "student")
    assert torch.equal(loaded(LETTERS).logits, student(LETTERS).logits)
    again = loaded.generate(LETTERS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(again, student.generate(LETTERS, max_new_tokens=5, do_sample=False, eos_token_id=None))
    loaded.save_pretrained(tmp_path / "again")
    assert code_in(tmp_path / "again") == code_in(tmp_path / "student")


def test_layers_behind_a_window_travel_with_the_folder(tmp_path, own_code):
    student = convert(tiny("llama"), mixer="based", window_layers=[1], window=4, sinks=1)
    student.save_pretrained(tmp_path / "student")
    assert 'KINDS = {"based": BasedMixer, "sliding_window": SlidingWindowMixer}' in "".join(
        code_in(tmp_path / "student").values()
    )
    loaded = own_code(tmp_path / "student")
    assert torch.equal(loaded(LETTERS).logits, student(LETTERS).logits)
    again = loaded.generate(LETTERS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(again, student.generate(LETTERS, max_new_tokens=5, do_sample=False, eos_token_id=None))


def test_bf16_by_the_folders_own_code(saved, own_code):
    _, folder = saved
    loaded = own_code(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    expected = load_student(folder, dtype=torch.bfloat16)
    assert torch.equal(loaded(LETTERS).logits, expected(LETTERS).logits)
    loaded.save_pretrained(folder.parent / "again")
    assert load_file(folder.parent / "again" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_code_of_another_version_is_noticed(saved, own_code):
    _, folder = saved
    path = folder / "distill_ssd_step.py"
    path.write_text(path.read_text() + "\n# another version\n")
    with pytest.raises(ImportError, match=r"distill_ssd_step\.py in .* two exports"):
        own_code(folder)


def test_line_ends_are_no_difference(saved, own_code):
    student, folder = saved
    for path in folder.glob("distill_*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert torch.equal(own_code(folder)(LETTERS).logits, student(LETTERS).logits)


def test_code_for_another_mixer_is_noticed(saved, tmp_path, own_code):
    """Weights and config of one student, code of another."""
    _, folder = saved
    convert(tiny("llama"), mixer="discrete_mamba2", keep_attention=[1]).save_pretrained(tmp_path / "other")
    for path in (tmp_path / "other").glob("*.py"):
        shutil.copy(path, folder)
    with pytest.raises(ValueError, match="kind mamba2, and this code has discrete_mamba2"):
        own_code(folder)


def test_an_adapter_trains_on_the_folders_own_code(saved, own_code):
    """The projections are ordinary linear layers: what is added to them learns, and merges."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    _, folder = saved
    config = peft.LoraConfig(target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(own_code(folder), config)
    model(LETTERS, labels=LETTERS).loss.backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 2 * 2
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters.values())
    adapted = model(LETTERS).logits
    torch.testing.assert_close(model.merge_and_unload()(LETTERS).logits, adapted, rtol=1e-4, atol=1e-4)


WITHOUT_THIS_PACKAGE = """
import importlib.util, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("distill", "eval", "stages"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import distill
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is there")

import torch
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.load(f"{folder}.ids")
    torch.save([model(ids).logits, model.generate(ids, max_new_tokens=12, do_sample=False)], f"{folder}.out")
    model.save_pretrained(f"{folder}.again")
"""


@pytest.mark.slow
def test_folders_load_where_this_package_is_not(tmp_path):
    """A fresh interpreter in which ``import distill`` fails; what it saves loads here again. One for all families."""
    students = {}
    for index, case in enumerate(CASES):
        folder = tmp_path / f"student{index}"
        students[folder] = convert(tiny_case(case), mixer=sorted(MIXERS)[index % len(MIXERS)], keep_attention=[1])
        students[folder].save_pretrained(folder)
        torch.save(LETTERS, f"{folder}.ids")
    program = [sys.executable, "-I", "-c", WITHOUT_THIS_PACKAGE, *students]
    environment = {"HF_HOME": str(tmp_path / "hub"), "PATH": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for (folder, student), case in zip(students.items(), CASES, strict=True):
        logits, generated = torch.load(f"{folder}.out")
        torch.testing.assert_close(logits, student(LETTERS).logits, rtol=1e-5, atol=1e-5, msg=case)
        assert torch.equal(generated, student.generate(LETTERS, max_new_tokens=12, do_sample=False)), case
        shutil.rmtree(folder)
        again = load_student(f"{folder}.again")
        kept = again.state_dict()
        assert all(torch.equal(kept[name], tensor) for name, tensor in student.state_dict().items()), case
        # Not bit for bit: where weights lie in memory decides how a product of them is summed up.
        torch.testing.assert_close(again(LETTERS).logits, student(LETTERS).logits, rtol=1e-6, atol=1e-6, msg=case)
