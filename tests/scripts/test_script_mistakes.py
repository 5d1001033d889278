"""What a user gets wrong with a measuring program is said before it measures anything, with exit code 2."""

import pytest
import torch
import typer
from typer.testing import CliRunner

from distill.errors import UserError
from scripts import bench_decode, bench_logits, bench_mixing, bench_scan, bench_steps, ceilings, forgetting, measure


def ended(program, *arguments):
    app = typer.Typer()
    app.command()(program.main)
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        (bench_steps, ["--stage", "nosuch"], "--stage is 'nosuch'; allowed are mixing, hidden and logits"),
        (bench_steps, ["--dtype", "float64"], "--dtype is 'float64'; allowed are float32 and bfloat16"),
        (ceilings, ["--device", "cpu", "--dtype", "float23"], "--dtype is 'float23'; allowed are float32, bfloat16,"),
        (ceilings, ["--device", "gpu"], "--device is 'gpu'; allowed are cpu and cuda"),
        (bench_decode, ["--dtype", "int8"], "--dtype is 'int8'; allowed are float32, bfloat16 and float16"),
        (bench_mixing, ["--lengths", "x"], "--lengths is 'x'; give numbers of tokens separated by commas"),
        (bench_mixing, ["--lengths", "512,0"], "--lengths is '512,0'; give numbers of tokens"),
        (bench_scan, ["--dtype", "float16"], "--dtype is 'float16'; allowed are float32 and bfloat16"),
        (bench_logits, ["--dtype", "half"], "--dtype is 'half'; allowed are float32 and bfloat16"),
    ],
)
def test_what_is_allowed_is_said(program, arguments, said):
    found = ended(program, *arguments)
    assert found.exit_code == 2, found.exception
    assert said in found.output


@pytest.mark.parametrize("program", [bench_decode, bench_logits, bench_mixing, bench_scan, bench_steps, ceilings])
def test_without_a_gpu_none_is_measured(program, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = ended(program, "--device", "cuda")
    assert found.exit_code == 2, found.exception
    assert "--device cuda: no CUDA device is visible to this PyTorch; use cpu" in found.output


def test_device_and_dtype_are_torch_s():
    assert measure.device_and_dtype("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)


def test_a_folder_is_no_file_to_write_figures_to(tmp_path):
    measure.require_file(None)
    measure.require_file(tmp_path / "figures.json")
    with pytest.raises(UserError, match=r"--output .* is a folder; name a file"):
        measure.require_file(tmp_path)


def test_a_text_that_is_missing_is_said_before_the_table_begins(tmp_path):
    found = ended(forgetting, tmp_path, tmp_path / "none.txt", tmp_path / "none.txt", tmp_path)
    assert found.exit_code == 2, found.exception
    assert f"{tmp_path / 'none.txt'}: cannot be read" in found.output
    assert "|" not in found.output


def test_a_tenth_of_a_text_is_of_its_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("é" * 1000, encoding="utf-8")
    assert forgetting.divided(path) == ("é" * 900, "é" * 100)
    path.write_text("short", encoding="utf-8")
    with pytest.raises(UserError, match="has 5 characters, too few to hold a tenth out"):
        forgetting.divided(path)
