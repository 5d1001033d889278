"""The programs on this device: the three stages of a tiny recipe, the same sharded, and an adapter in fp16.

python -m scripts.gpu_programs --device cuda
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from scripts.gpu_parity import Row, compare

RECIPE = """\
name: gpu
run_dir: {folder}/run
device: {device}
dtype: {dtype}
teacher: {{path: teachers/stdlib-1m}}
student: {{keep_attention: [1]}}
data: {{source: {folder}/text, block: 128, held_out: {{fraction: 0.1, by: tail}}}}
stages:
  mixing: {{tokens: {tokens}, batch_size: 8}}
  hidden: {{tokens: {tokens}, batch_size: 8, lr: 1.0e-2}}
  logits: {{tokens: {tokens}, batch_size: 8}}
evaluation: {{tokens: 2K, batch_size: 8, prompts: ["def main("], new_tokens: 16}}
"""

STAGES = ("mixing", "hidden", "logits")
_ANSWER = {"role": "assistant", "content": "self, name):\n    return self.name"}


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    tokens: Annotated[str, typer.Option(help="Of every stage.")] = "16K",
    output: Annotated[Path | None, typer.Option(help="Also write the rows here, as JSON.")] = None,
) -> None:
    """Run everything and print a table."""
    compare([partial(trained, tokens)], device, output)


def trained(tokens: str, device: torch.device) -> Iterator[Row]:
    """The three stages of a tiny recipe from the shipped teacher, the same sharded, and an adapter in fp16.

    They finish, and no loss is higher at its end.
    """
    dtype, tuned = ("bfloat16", "float16") if device.type == "cuda" else ("float32", "float32")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "text").mkdir()
        for path in Path(sysconfig.get_path("stdlib"), "email").glob("*.py"):
            shutil.copy(path, folder / "text")
        chats = ({"messages": [{"role": "user", "content": f"def f{n}("}, _ANSWER]} for n in range(1024))
        (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
        recipe = folder / "gpu.yaml"
        recipe.write_text(RECIPE.format(folder=folder, device=device.type, dtype=dtype, tokens=tokens))
        run = ["-m", "stages.run", str(recipe)]
        sharded = ["-m", "accelerate.commands.launch", "--config_file", "recipes/launch/fsdp2.yaml"]
        sharded += ["--num_processes", "1", *run, f"run_dir={folder}/sharded"]
        tuning = ["-m", "stages.finetune", "recipes/finetune/chat.yaml", f"model={folder}/run/logits"]
        tuning += [f"data.source={folder}/chats.jsonl", f"run_dir={folder}/tuned", f"device={device.type}"]
        with ThreadPoolExecutor() as together:
            by_fsdp2 = together.submit(_run, "stages.run by FSDP2", sharded, folder / "sharded", STAGES, dtype)
            yield from _run("stages.run", run, folder / "run", STAGES, dtype)
            tuning.append(f"dtype={tuned}")
            yield from _run("stages.finetune, LoRA", tuning, folder / "tuned", ("finetune",), tuned)
            yield from by_fsdp2.result()


def _run(what: str, options: list[str], folder: Path, stages: Iterable[str], dtype: str) -> list[Row]:
    """A program's loss at the end of each of its stages over that at the start, and its exit code."""
    done = subprocess.run([sys.executable, *options], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    rows = []
    for stage in stages:
        told = folder / stage / "stage.json"
        if told.exists():
            losses = json.loads(told.read_text())
            ratio = losses["loss_end"] / losses["loss_start"]
            rows.append(Row(f"{what}: {stage}, last loss / first", dtype, ratio, 1.0))
    said = done.stderr.strip().splitlines()[-1] if done.returncode and done.stderr.strip() else ""
    return [*rows, Row(f"{what}: exit code", dtype, float(done.returncode), 0.0, said)]


if __name__ == "__main__":
    typer.run(main)
