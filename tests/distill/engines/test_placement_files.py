"""From a Hugging Face folder to where an engine wants the weights, and back to a folder; whole and in shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel

from distill import convert, load_student
from distill.conversion import load_teacher, unset_model
from distill.engines import placement, processes, saving
from distill.engines.launched import Launched
from distill.engines.placement import place_student, place_teacher
from distill.engines.saving import save_student
from distill.errors import UserError
from distill.mixers import MIXERS
from distill.stored_weights import StoredWeights
from tests.conftest import tiny
from tests.distill.engines.several import several

CPU = torch.device("cpu")
FSDP2 = Launched("fsdp2", {"reshard_after_forward": True})
IDS = torch.arange(3, 23)[None]


@pytest.fixture
def teacher_folder(tmp_path, family) -> Path:
    tiny(family).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def student_folder(tmp_path, teacher_folder) -> Path:
    convert(teacher_folder, mixer="discrete_mamba2", keep_attention=[1]).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and all buffers, those included that no file holds."""
    return {name: whole(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def require_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def filled(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Built without weights, then filled from the files, as sharded models are."""
    model = unset_model(AutoConfig.from_pretrained(folder), dtype)
    placement._fill(model, StoredWeights(folder, model.base_model_prefix))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_filled_from_its_files_is_the_one_that_is_loaded(teacher_folder, dtype):
    loaded, built = load_teacher(teacher_folder, dtype), filled(teacher_folder, dtype)
    require_same(tensors(built), tensors(loaded))
    assert torch.equal(built(IDS).logits, loaded(IDS).logits)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_student_filled_from_its_files_is_the_one_that_is_loaded(tmp_path, teacher_folder, mixer):
    convert(teacher_folder, mixer=mixer, keep_attention=[1]).save_pretrained(tmp_path / "student")
    loaded, built = load_student(tmp_path / "student"), filled(tmp_path / "student", torch.float32)
    assert type(built) is type(loaded)
    require_same(tensors(built), tensors(loaded))
    assert torch.equal(built(IDS).logits, loaded(IDS).logits)
    assert is_tied(built) == is_tied(loaded)


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_folder_that_lacks_a_weight_is_refused_by_name(student_folder):
    config = json.loads((student_folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config["distill"]["layers"].append("attention")
    if "layer_types" in config:
        config["layer_types"].append("full_attention")
    (student_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks weights of its model: model\.layers\.3\."):
        filled(student_folder, torch.float32)


def test_one_process_has_the_whole_on_its_device(student_folder, teacher_folder):
    student = place_student(student_folder, Launched("one"), CPU)
    require_same(tensors(student), tensors(load_student(student_folder)))
    teacher = place_teacher(str(teacher_folder), torch.bfloat16, Launched("ddp"), CPU)
    assert teacher.dtype == torch.bfloat16
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def sharded_student(folder: Path) -> tuple:
    student = place_student(folder, FSDP2, CPU)
    assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    here = sum(parameter.to_local().numel() for parameter in student.parameters())
    with torch.no_grad():
        logits = student(IDS).logits
    return tensors(student), here, logits, student.generation_config.to_dict()


def test_each_process_has_its_shards_of_a_student(student_folder):
    expected = load_student(student_folder)
    results = several(2, sharded_student, student_folder)
    for got, _, logits, generation in results:
        require_same(got, tensors(expected))
        assert torch.equal(logits, expected(IDS).logits)
        assert generation == expected.generation_config.to_dict()
    numbers = sum(parameter.numel() for parameter in expected.parameters())
    assert sum(here for _, here, *_ in results) == numbers
    assert max(here for _, here, *_ in results) < 0.6 * numbers


def sharded_teacher(folder: Path) -> tuple:
    teacher = place_teacher(str(folder), torch.bfloat16, FSDP2, CPU)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.no_grad():
        return tensors(teacher), teacher(IDS).logits


def test_each_process_has_its_shards_of_a_teacher(teacher_folder):
    expected = load_teacher(teacher_folder, torch.bfloat16)
    for got, logits in several(2, sharded_teacher, teacher_folder):
        require_same(got, tensors(expected))
        assert torch.equal(logits, expected(IDS).logits)


def sharded_and_saved(source: Path, target: Path, file_bytes: int) -> None:
    saving.FILE_BYTES = file_bytes
    student = place_student(source, FSDP2, CPU)
    if processes.is_main():
        target.mkdir()
    processes.wait()
    save_student(student, target)


@pytest.mark.parametrize("file_bytes", [10**9, 20_000, 1], ids=["one file", "several", "one a weight"])
def test_a_sharded_student_is_saved_as_a_whole_one_is(tmp_path, student_folder, file_bytes):
    folder = tmp_path / "saved"
    several(2, sharded_and_saved, student_folder, folder, file_bytes)

    original = load_student(student_folder)
    require_same(tensors(load_student(folder)), tensors(original))
    expected = load_file(student_folder / "model.safetensors")
    files = sorted(folder.glob("*.safetensors"))
    require_same({name: tensor for file in files for name, tensor in load_file(file).items()}, expected)
    names = {path.name for path in folder.iterdir()} - {path.name for path in files}
    beside = {path.name for path in student_folder.iterdir()} - {"model.safetensors"}
    if len(files) == 1:
        assert names == beside
        assert files[0].name == "model.safetensors"
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
        assert index["weight_map"].keys() == expected.keys()
        assert {folder / name for name in index["weight_map"].values()} == set(files)
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        assert 1 < len(files) <= len(expected)
        assert all(len(load_file(file)) == 1 or file.stat().st_size < file_bytes + 4000 for file in files)
        assert names == beside | {"model.safetensors.index.json"}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((student_folder / name).read_text()), name


WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["distill"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.arange(3, 23)[None]).logits, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama"])
def test_a_sharded_student_s_folder_loads_where_this_package_is_not(tmp_path, student_folder):
    folder, logits = tmp_path / "saved", tmp_path / "logits"
    several(2, sharded_and_saved, student_folder, folder, 10**9)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, str(folder), str(logits)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(logits), load_student(student_folder)(IDS).logits)
