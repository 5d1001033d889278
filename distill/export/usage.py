"""How each format is loaded, as its model card tells: what to install and what to type."""

TAGS = {
    "standalone": ["custom_code"],
    "granite": ["granitemoehybrid"],
    "bamba": ["bamba"],
    "gguf": ["gguf", "llama.cpp"],
}

_PYTHON = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto"{remote})
tokenizer = AutoTokenizer.from_pretrained("{place}"{remote})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```"""

_NEEDED = {
    "standalone": "transformers ≥ 5.21 and PyTorch ≥ 2.7. The folder carries its own modelling code, which"
    " `trust_remote_code=True` runs: read it first. On CUDA it takes flash-linear-attention's or mamba-ssm's kernels"
    " where they are installed.",
    "granite": "transformers' own `GraniteMoeHybridForCausalLM`; no code of this folder runs.",
    "bamba": "transformers' own `BambaForCausalLM`; no code of this folder runs.",
    "gguf": "llama.cpp, or a program built on it.",
}

_MORE = {
    "granite": "```bash\nvllm serve {place}\n```",
    "gguf": "```bash\nllama-cli -m {file} -p 'Once upon a time' -n 50\n```",
}


def how_to_load(format_: str, place: str, *, quantised: bool = False, file: str | None = None) -> str:
    """Markdown: what is needed, and the lines to copy.

    Args:
        format_: a key of ``distill.export.formats.FORMATS``.
        place: what is passed to ``from_pretrained``.
        quantised: whether the weights are torchao's.
        file: of a format that is one file, its name.
    """
    needed = _NEEDED[format_] + (" The weights are stored in int8: `pip install torchao`." if quantised else "")
    remote = ", trust_remote_code=True" if format_ == "standalone" else ""
    python = [_PYTHON.format(place=place, remote=remote)] if format_ != "gguf" else []
    more = [_MORE[format_].format(place=place, file=file)] if format_ in _MORE else []
    return "\n\n".join([f"Needs {needed}", *python, *more])
