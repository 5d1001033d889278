"""A distillation that takes seconds: a tiny random Llama with a tokenizer of its own, real text, three short stages."""

import functools
import json
import os
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.stages.launch import Ranks
from tests.stages.program import Ended, fresh, run

VOCABULARY = 300
MODULES = ("json", "tomllib", "wsgiref")

RECIPE = """\
name: tiny
run_dir: {folder}/run
teacher: {{path: {teacher}}}
student: {{keep_attention: [1]}}
data:
  source: {text}
  block: 32
  held_out: {{fraction: 0.1, by: tail}}
stages:
  mixing: {{tokens: 3072, batch_size: 4, checkpoint_every: 6}}
  hidden: {{tokens: 3072, batch_size: 4, checkpoint_every: 6, lr: 1e-2, eval_every: 8}}
  logits: {{tokens: 3072, batch_size: 4, checkpoint_every: 6}}
evaluation: {{tokens: 512, prompts: ["def ", "import json"], new_tokens: 8}}
"""
STEPS = 24

# Rates at which a rounding of the last bit, which another number of processes brings, stays small for all steps.
CALM = ("device=cpu", "stages.hidden.lr=1e-3", "stages.logits.lr=1e-4")


def write_recipe(folder: Path, teacher: Path, text: Path) -> Path:
    """A recipe of all three stages, ``STEPS`` steps each, whose run_dir is ``run`` beside it."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(folder=folder, teacher=teacher, text=text))
    return path


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that all workers of a session share: who needs it first makes it, the others wait for it."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, whole = root / name, root / f"{name}.made"
    with FileLock(root / f"{name}.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A folder of real text: a few modules of the standard library."""
    return made_once(tmp_path_factory, "text", write_text)


def write_text(folder: Path) -> None:
    for module in MODULES:
        for path in Path(sysconfig.get_path("stdlib"), module).glob("*.py"):
            shutil.copy(path, folder / f"{module}-{path.name}")


@pytest.fixture(scope="session")
def saved_teacher(text, tmp_path_factory) -> Path:
    """A saved Llama of random weights, with a byte-level tokenizer that was trained on the text."""
    return made_once(tmp_path_factory, "tiny-llama", lambda folder: write_teacher(folder, text))


def write_teacher(folder: Path, text: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([path.read_text() for path in sorted(text.iterdir())], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def recipe(tmp_path, saved_teacher, text) -> Path:
    return write_recipe(tmp_path, saved_teacher, text)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, saved_teacher, text) -> tuple[Path, Ended]:
    """The folder of a run that nothing interrupted, and what it said."""

    def make(folder: Path) -> None:
        ended = fresh("stages.run", write_recipe(folder, saved_teacher, text))
        assert ended.code == 0, ended.err
        (folder / "ended.json").write_text(json.dumps(ended))

    folder = made_once(tmp_path_factory, "whole", make)
    return folder / "run", Ended(*json.loads((folder / "ended.json").read_text()))


@pytest.fixture
def finished(whole, recipe) -> Path:
    """A copy of the whole run, at the run_dir of ``recipe``."""
    return Path(shutil.copytree(whole[0], recipe.with_name("run")))


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, saved_teacher, text) -> Callable[[str], Path]:
    """``uninterrupted("ddp")`` is the folder of a whole calm run by two processes, "one" of one by a single process."""

    @functools.cache
    def made(config: str) -> Path:
        if config.startswith("zero") and find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        return made_once(tmp_path_factory, config, functools.partial(run_under, config)) / "run"

    def run_under(config: str, folder: Path) -> None:
        command = "stages.run", write_recipe(folder, saved_teacher, text), *CALM
        ended = run(*command) if config == "one" else Ranks(config, *command).wait()
        assert not any([ended.code] if isinstance(ended, Ended) else ended.codes), ended

    return made
