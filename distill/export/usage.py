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

_PYTHON_WITH_IMAGES = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{place}", dtype="auto"{remote})
processor = AutoProcessor.from_pretrained("{place}")
asked = [{{"type": "image", "url": "image.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": asked}}],
    tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
print(processor.decode(model.generate(**inputs, max_new_tokens=50)[0]))
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

_NOT_SERVED = (
    "vLLM does not load it: it takes hidden size / heads for the width of an attention head, and these have another."
)


def how_to_load(
    format_: str,
    place: str,
    *,
    quantised: bool = False,
    file: str | None = None,
    images: bool = False,
    heads_fill_width: bool = True,
) -> str:
    """Markdown: what is needed, and the lines to copy.

    Args:
        format_: a key of ``distill.export.formats.FORMATS``.
        place: what is passed to ``from_pretrained``.
        quantised: whether the weights are torchao's.
        file: of a format that is one file, its name.
        images: whether the student reads images.
        heads_fill_width: whether the attention heads are together as wide as the model.
    """
    needed = _NEEDED[format_] + (" The weights are stored in int8: `pip install torchao`." if quantised else "")
    remote = ", trust_remote_code=True" if format_ == "standalone" else ""
    lines = _PYTHON_WITH_IMAGES if images else _PYTHON
    python = [lines.format(place=place, remote=remote)] if format_ != "gguf" else []
    more = [_MORE[format_].format(place=place, file=file)] if format_ in _MORE else []
    if format_ == "granite" and not heads_fill_width:
        more = [_NOT_SERVED]
    return "\n\n".join([f"Needs {needed}", *python, *more])
