"""What a process really holds in the logits stage under each engine, beside what ``distill plan`` says.

    python -m scripts.bench_memory            # about ten minutes on two cores; --parameters 50 for a quicker look

A teacher of 200M random parameters, two CPU processes, three steps of stage 3, in fp32. A process's anonymous memory
(RssAnon: not the files it maps) is read every few milliseconds while it trains; what it had when it had imported
everything and loaded nothing is taken off. Weights are 0.79 GB a copy.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill.units import size

ENGINES = ("ddp", "zero1", "zero2", "fsdp2", "zero3")
PROCESSES, STEPS, BLOCK = 2, 3, 128
VOCABULARY = 16_384
LAYER = 11_185_152
"""Parameters of a decoder layer of the widths below, which are those of a 1024-wide Llama."""

RECIPE = """\
name: memory
run_dir: {folder}/run
device: cpu
teacher: {{path: {folder}/teacher}}
student: {{keep_attention: {{ratio: 0.25}}}}
data: {{source: {folder}/text.txt, separator: "\\n\\n", block: {block}}}
stages:
  logits: {{tokens: {tokens}, batch_size: {processes}, checkpoint_every: 1000}}
evaluation: {{tokens: {block}, batch_size: 1}}
"""


def main(
    parameters: Annotated[int, typer.Option(help="Millions of parameters of the teacher.")] = 200,
    output: Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")] = None,
    idle: Annotated[bool, typer.Option("--idle", hidden=True)] = False,
) -> None:
    """Measure every engine and print a table."""
    if idle:
        _be_idle()
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = prepare(folder, parameters)
        planned = plan(recipe)
        rows = {engine: measure(engine, recipe) for engine in ENGINES}
    figures = {
        engine: {"measured": measured, "planned": planned[engine], "ratio": planned[engine] / measured}
        for engine, measured in rows.items()
    }
    Console().print(shown(figures, parameters))
    if output:
        output.write_text(json.dumps(figures, indent=1))


def prepare(folder: Path, parameters: int) -> Path:
    """A random teacher with a tokenizer of its vocabulary, a text, and the student that conversion makes of it."""
    tokenizer = AutoTokenizer.from_pretrained("teachers/stdlib-1m")
    tokenizer.add_tokens([f"<unused{index}>" for index in range(VOCABULARY - len(tokenizer))])
    tokenizer.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=max(2, round((parameters * 1e6 - VOCABULARY * 1024) / LAYER)),
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    # Any text will do: memory does not depend on what it says.
    (folder / "text.txt").write_text("\n\n".join(f"paragraph {index} of a text" * 8 for index in range(2000)))
    tokens = STEPS * PROCESSES * BLOCK
    path = folder / "memory.yaml"
    path.write_text(RECIPE.format(folder=folder, block=BLOCK, tokens=tokens, processes=PROCESSES))
    _run([sys.executable, "-m", "stages.convert", str(path)])
    return path


def plan(recipe: Path) -> dict[str, int]:
    """What `distill plan` says a process holds, by engine."""
    command = [sys.executable, "-c", "from distill.cli import main; main()", "plan", str(recipe), "--json"]
    command += ["--devices", str(PROCESSES), "--device-memory", "64GB", "--flops", "50G"]
    told = json.loads(_run(command))
    (logits,) = told["stages"]
    return {mode["mode"]: mode["memory"]["total"] for mode in logits["modes"]}


def measure(engine: str, recipe: Path) -> int:
    """The largest anonymous memory of any process while it trains, in bytes, less what an idle one has."""
    run_dir = recipe.parent / "run"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"recipes/launch/{engine}.yaml"]
    launcher += ["--num_processes", str(PROCESSES), "-m"]
    # Freed tensors go back to the machine at once, so that the peak is that of what is alive.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    idle = _run([*launcher, "scripts.bench_memory", "--idle"], environment)
    started = subprocess.Popen(
        [*launcher, "stages.logits", str(recipe)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = _Watch(started.pid, run_dir / "training/logits/metrics.jsonl")
    said, _ = started.communicate()
    watch.join()
    _run(["rm", "-rf", str(run_dir / "logits"), str(run_dir / "training")])
    if started.returncode:
        raise SystemExit(f"{engine} failed:\n{said}")
    return watch.peak - max(map(int, idle.split()))


class _Watch(threading.Thread):
    """Reads the memory of a launcher's ranks while they train; ``peak`` is the largest of any."""

    def __init__(self, launcher: int, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.launcher, self.metrics = launcher, metrics
        self.peak = 0
        self.start()

    def run(self) -> None:
        while Path(f"/proc/{self.launcher}").exists() and not _is_zombie(self.launcher):
            steps = self._steps()
            held = [_anonymous(pid) for pid in _ranks(self.launcher)]
            if held and 1 <= steps < STEPS:
                self.peak = max(self.peak, *held)
            time.sleep(0.005)

    def _steps(self) -> int:
        try:
            return self.metrics.read_text().count('"train"')
        except FileNotFoundError:
            return 0


def shown(figures: dict[str, dict[str, float]], parameters: int) -> Table:
    """One row an engine."""
    ddp = figures["ddp"]["measured"]
    table = Table(title=f"{parameters}M parameters, {PROCESSES} processes, logits stage", box=box.SIMPLE_HEAD)
    for column in ("engine", "measured", "of ddp", "planned", "planned / measured"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for engine, row in figures.items():
        table.add_row(
            engine,
            size(row["measured"]),
            f"{row['measured'] / ddp:.0%}",
            size(row["planned"]),
            f"{row['ratio']:.2f}",
        )
    return table


def _be_idle() -> None:
    """What a rank is before it loads anything: everything imported, the processes joined. Prints its memory."""
    import stages.logits  # noqa: F401
    from distill.engines import processes
    from distill.engines.launched import launched

    processes.start("cpu")
    launched()
    if processes.is_main():
        print(_anonymous(os.getpid()))
    processes.wait()


def _ranks(launcher: int) -> list[int]:
    """The processes that the launcher started to train."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(pid) for pid in children if b"stages.logits" in _read(f"/proc/{pid}/cmdline")]


def _anonymous(pid: int) -> int:
    for line in _read(f"/proc/{pid}/status").decode().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def _is_zombie(pid: int) -> bool:
    return b"State:\tZ" in _read(f"/proc/{pid}/status")


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _run(command: list[str], environment: Mapping[str, str] = os.environ) -> str:
    done = subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


if __name__ == "__main__":
    typer.run(main)
