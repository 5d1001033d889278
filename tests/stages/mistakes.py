"""What people get wrong, and the words that must tell them."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

Harm = Callable[[Path], object]


def nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Mistake:
    """Something wrong with a run of the recipe ``tiny.yaml``.

    Attributes:
        said: what the message must contain: what was given, what is allowed.
        settings: given on the command line; ``{folder}`` stands for the folder below.
        harm: done to the folder that holds tiny.yaml, ``teacher`` and ``text``.
    """

    said: tuple[str, ...]
    settings: tuple[str, ...] = ()
    harm: Harm = nothing

    def settings_in(self, folder: Path) -> list[str]:
        return [text.format(folder=folder) for text in self.settings]


def edit(old: str, new: str) -> Harm:
    """Another word in the recipe."""

    def harm(folder: Path) -> None:
        recipe = folder / "tiny.yaml"
        assert old in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(old, new))

    return harm


def write(name: str, content: bytes) -> Harm:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Harm:
    return lambda folder: os.truncate(folder / name, size)


def remove(name: str) -> Harm:
    return lambda folder: (folder / name).unlink()


def put_text_at(name: str) -> Harm:
    return lambda folder: shutil.copytree(folder / "text", folder / name)


def add_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_tokens([f"word{number}" for number in range(50)])
    tokenizer.save_pretrained(folder / "teacher")


MISTAKES = {
    "misspelt key": Mistake(
        ("tiny.yaml:10: stages.mixing.tokns: unknown key, did you mean 'tokens'? (allowed: tokens, block, batch_size",),
        harm=edit("mixing: {tokens", "mixing: {tokns"),
    ),
    "misspelt section": Mistake(
        ("tiny.yaml:11: stages.hiden: unknown key, did you mean 'hidden'? (allowed: mixing, hidden, logits)",),
        harm=edit("hidden:", "hiden:"),
    ),
    "misspelt setting": Mistake(
        ("override: stages.logits.temprature: unknown key, did you mean 'temperature'?",),
        ("stages.logits.temprature=2.0",),
    ),
    "wrong type": Mistake(("data.block: must be a whole number, not 'many'",), ("data.block=many",)),
    "wrong value": Mistake(
        (
            "student.mixer: must be one of mamba2, discrete_mamba2, gated_deltanet, based, hedgehog, sliding_window,"
            " not 'mamba3', did you mean 'mamba2'?",
        ),
        ("student.mixer=mamba3",),
    ),
    "wrong order": Mistake(
        ("tiny.yaml:11: stages.mixing: stands after 'logits'; the order is mixing, hidden, logits",),
        harm=edit("  mixing:", "  logits: {tokens: 1K}\n  mixing:"),
    ),
    "no YAML": Mistake(("tiny.yaml:", "not valid YAML"), harm=edit("stages:", "stages: [")),
    "sixty at once": Mistake(("key0: unknown key", "and 45 more"), tuple(f"key{number}=1" for number in range(60))),
    "no copies": Mistake(
        ("student.expand is 2, but based forgets nothing",),
        ("student.expand=2", "student.mixer=based", "stages.mixing=null"),
    ),
    "layer out of range": Mistake(
        ("student.keep_attention names layer 3; the teacher has 3 layers",), ("student.keep_attention=[3]",)
    ),
    "no layer to train": Mistake(
        ("student.keep_attention leaves nothing for mixing and hidden to train",), ("student.keep_attention=[0, 1, 2]",)
    ),
    "no teacher": Mistake(
        ("teacher.path: no folder", "models in", "teacher2"),
        harm=lambda folder: (folder / "teacher").rename(folder / "teacher2"),
    ),
    "teacher cut short": Mistake(
        ("model.safetensors is truncated: 50000 bytes where its header says", "download it again"),
        harm=cut("teacher/model.safetensors", 50_000),
    ),
    "teacher cut to nothing": Mistake(
        ("model.safetensors (4 bytes) is not a whole safetensors file",), harm=cut("teacher/model.safetensors", 4)
    ),
    "no weights": Mistake(
        ("teacher.path:", "holds no weights: neither model.safetensors nor"), harm=remove("teacher/model.safetensors")
    ),
    "no tokenizer": Mistake(("has no tokenizer: none of tokenizer.json",), harm=remove("teacher/tokenizer.json")),
    "another's tokenizer": Mistake(
        ("the tokenizer has 350 tokens", "a vocabulary of 300", "use the one this model was trained with"),
        harm=add_tokens,
    ),
    "another family": Mistake(
        ("teacher.path: this mpt has ALiBi", "take another checkpoint"),
        harm=write("teacher/config.json", b'{"model_type": "mpt"}'),
    ),
    "no text": Mistake(
        ("data.source", "no such file or folder", "allowed: 'python-stdlib', a file, a folder, a glob"),
        harm=lambda folder: shutil.rmtree(folder / "text"),
    ),
    "empty text": Mistake(
        ("empty.txt: the file is empty",), ("data.source={folder}/empty.txt",), write("empty.txt", b"")
    ),
    "binary text": Mistake(
        ("binary.txt: is a binary file (zero byte at offset 2); give text files",),
        ("data.source={folder}/binary.txt",),
        write("binary.txt", b"ab\0c"),
    ),
    "binary text among others": Mistake(("zlib.py: is a binary file",), harm=write("text/zlib.py", b"ab\0c")),
    "no UTF-8": Mistake(
        ("zlib.py: is not UTF-8 text (byte 0xe9 at offset 3)",), harm=write("text/zlib.py", b"caf\xe9")
    ),
    "less than a block": Mistake(
        ("the train text has 9 tokens, less than one block of 32; give more text, lower data.block",),
        ("data.source={folder}/short.txt", "data.separator='/'"),
        write("short.txt", b"a b c/d e/f g"),
    ),
    "nothing held out": Mistake(
        ("splitting 1 document(s) by tail at 0.1 leaves nothing held out; give more documents",),
        ("data.source={folder}/one.txt",),
        write("one.txt", b"words " * 1000),
    ),
    "less than a step": Mistake(
        ("stages.hidden.tokens: 127 tokens are less than one step of 128",), ("stages.hidden.tokens=127",)
    ),
    "block too long": Mistake(
        ("data.block: 65 tokens are more than the 64 positions that the teacher knows",), ("data.block=65",)
    ),
    "unknown tracker": Mistake(("trackers[0]: must be tensorboard, not 'wandb'",), ("trackers=[wandb]",)),
    "a GPU that is not there": Mistake(
        ("device: no CUDA device is visible to this PyTorch; use auto or cpu",), ("device=cuda",)
    ),
    "float16": Mistake(("dtype: must be one of float32, bfloat16, not 'float16'",), ("dtype=float16",)),
    "run_dir is a file": Mistake(("run_dir: ", "tiny.yaml is a file"), ("run_dir={folder}/tiny.yaml",)),
    "somebody's data": Mistake(("run/data: holds something other than prepared data",), harm=put_text_at("run/data")),
    "somebody's stage": Mistake(
        ("run/hidden is not empty and holds no stage.json, so it is not a finished stage and is not replaced",),
        harm=put_text_at("run/hidden"),
    ),
}
