"""Every launch config is accepted by accelerate, says when to take it, and starts the engine that it names."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.conftest import CHECKOUT

FOLDER = CHECKOUT / "recipes" / "launch"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
ENGINES = {
    "one_process": "one",
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero3_offload": "zero3",
    "multi_node": "fsdp2",
}

PROGRAM = """
import json, pathlib, sys
import torch.distributed as dist
from distill.engines import processes
from distill.engines.launched import launched

processes.start("cpu")
seen = {
    "rank": processes.rank(),
    "all": processes.gather(processes.rank()),
    "backend": dist.get_backend(),
    "engine": launched().kind,
    "offload": launched().settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none"),
    "arguments": sys.argv[2:],
}
pathlib.Path(sys.argv[1], f"{processes.rank()}.json").write_text(json.dumps(seen))
processes.wait()
"""

each = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line for line in lines[: lines.index("compute_environment: LOCAL_MACHINE")])


def test_there_is_one_for_every_engine():
    assert {path.stem for path in CONFIGS} == ENGINES.keys()


@each
def test_its_header_says_when_and_with_what_to_take_it(path):
    text = header(path)
    assert all(line.startswith("# ") for line in text.splitlines())
    assert f"# Engine: {ENGINES[path.stem]}. Needs: " in text
    assert ("--num_processes" in text) == (path.stem != "one_process")
    assert ("distill-ssm[deepspeed]" in text) == path.stem.startswith("zero")


@each
def test_accelerate_accepts_it_and_leaves_precision_and_device_to_the_recipe(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"
    assert config.use_cpu is False
    assert config.num_processes % config.num_machines == 0
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    # A fixed port is for machines that must agree on one; two runs on the same machine must not.
    assert config.main_process_port == (29500 if path.stem == "multi_node" else 0)


@each
def test_every_key_is_one_that_the_launcher_knows(path, tmp_path):
    """accelerate refuses unknown keys at the top and silently ignores them below."""
    stated = yaml.safe_load(path.read_text())
    options = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(stated.get(section, {})) <= options

    wrong = tmp_path / path.name
    wrong.write_text(path.read_text() + "num_proceses: 4\n")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(wrong))


@pytest.mark.slow
@each
def test_it_starts_the_engine_it_names_on_a_cpu(path, tmp_path):
    """The shipped file itself: it needs no twin for CPUs."""
    if path.stem.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    processes = 1 if path.stem == "one_process" else 2
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    command += ["--num_processes", str(processes)]
    command += ["--num_machines", "1", "--main_process_port", "0"] if path.stem == "multi_node" else []
    ended = subprocess.run(
        [*command, "-m", "program", str(tmp_path), "recipe.yaml", "a=b c"],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{tmp_path}:{CHECKOUT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    assert seen == [
        {
            "rank": rank,
            "all": list(range(processes)),
            "backend": "gloo",
            "engine": ENGINES[path.stem],
            "offload": "cpu" if path.stem == "zero3_offload" else "none",
            "arguments": ["recipe.yaml", "a=b c"],
        }
        for rank in range(processes)
    ]
