"""A tokenizer in llama.cpp's terms: the tokens with their kinds, and how text is cut into them.

llama.cpp reimplements tokenizers instead of reading them, so only what it has is said, and anything else refused:

- ``gpt2``: byte-level BPE with merges, text cut first by one of the rules it knows by name (``CUTS``);
- ``llama``: SentencePiece's BPE with bytes for what has no piece, where pieces of the highest score are joined first.
  A Hugging Face folder has merges in its place; a piece's score is then how early it is merged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""What a token is, numbered as in GGUF."""

# The cuts of byte-level BPE: Hugging Face's regular expression and whether digits stand alone, to llama.cpp's name.
_GPT2 = "gpt2"  # the expression built into Hugging Face's ByteLevel
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CUTS: dict[tuple[str, bool], str] = {
    (_GPT2, False): "gpt-2",
    (_GPT2, True): "smollm",
    (_LLAMA3, False): "llama-bpe",
    (_QWEN2, False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer.

    Attributes:
        model: ``"gpt2"`` or ``"llama"``.
        cut: llama.cpp's name of how text is cut before it is tokenised.
        tokens: texts in the order of their ids, up to the rows of the embedding.
        kinds: one of ``NORMAL`` … ``BYTE`` for each.
        merges: for ``gpt2``: pairs that are joined, the first ones first.
        scores: for ``llama``: pieces with the highest are made first.
        special: ids by role: bos, eos, unk, pad.
        add_bos, add_eos: whether tokenising adds them.
        add_space: for ``llama``: whether text begins with a space that is not there.
        chat_template: Jinja, or None.
    """

    model: str
    cut: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    chat_template: str | None


def vocabulary(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> Vocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: a fast one.
        n_rows: of the embedding; ids without a token become unused ones.

    Raises:
        UserError: llama.cpp has nothing of the kind; with what it was.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__} has no tokenizer.json, from which gguf is written")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise _refused(f"a {model['type']} tokenizer")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    pieces = _is_sentencepiece(spec)
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= n_rows:
        raise UserError(
            f"gguf: the tokenizer has a token {max(texts)} and the embedding {n_rows} rows: not its model's"
        )
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(n_rows)]
    kinds = _kinds(spec, n_rows, byte_fallback=pieces)
    special = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    added = tokenizer("a")["input_ids"]
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        cut="default" if pieces else _cut(spec["pre_tokenizer"]),
        tokens=tokens,
        kinds=kinds,
        merges=[] if pieces else [" ".join(pair) for pair in merges],
        scores=_scores(tokens, kinds, merges) if pieces else [],
        special={role: number for role, number in special.items() if number is not None},
        add_bos=special["bos"] is not None and added[0] == special["bos"],
        add_eos=special["eos"] is not None and added[-1] == special["eos"],
        add_space=pieces and _adds_space(spec),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Whether blanks are written ▁, and bytes stand for what has no piece."""
    return bool(spec["model"].get("byte_fallback")) and any(
        "▁" in json.dumps(spec[part], ensure_ascii=False) for part in ("normalizer", "pre_tokenizer")
    )


def _kinds(spec: Mapping[str, Any], n_rows: int, *, byte_fallback: bool) -> list[int]:
    model = spec["model"]
    kinds = [UNUSED] * n_rows
    for text, number in model["vocab"].items():
        is_byte = byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        kinds[number] = BYTE if is_byte else NORMAL
    for token in spec["added_tokens"]:
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if byte_fallback and model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = UNKNOWN
    return kinds


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Minus the place of the first merge that makes a piece; llama.cpp joins the pair with the highest score first.

    Raises:
        UserError: a piece is made by no merge: llama.cpp would make it all the same.
    """
    first: dict[str, int] = {}
    for place, pair in enumerate(merges):
        first.setdefault("".join(pair), place)
    unmade = [
        token
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == NORMAL and len(token) > 1 and token not in first
    ]
    if unmade:
        raise _refused(f"a tokenizer with pieces that no merge makes ({', '.join(map(repr, unmade[:3]))})")
    last = float(-len(merges))
    return [
        float(-first[token]) if kind == NORMAL and token in first else last if kind == NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _adds_space(spec: Mapping[str, Any]) -> bool:
    """Whether a blank is put before the text, by the normalizer or by the Metaspace that cuts it."""
    for step in (*_steps(spec["normalizer"], "normalizers"), *_steps(spec["pre_tokenizer"], "pretokenizers")):
        if step["type"] == "Prepend":
            return True
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _cut(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """llama.cpp's name for how text is cut.

    Raises:
        UserError: it has no name for it.
    """
    steps = list(_steps(pre_tokenizer, "pretokenizers"))
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    digits = [step for step in steps if step["type"] == "Digits"]
    splits = [step for step in steps if step["type"] == "Split"]
    whole = len(byte_level) == 1 and len(byte_level) + len(digits) + len(splits) == len(steps) and len(splits) <= 1
    if whole and not byte_level[0].get("add_prefix_space"):
        pattern = splits[0]["pattern"].get("Regex", "") if splits else ""
        by_regex = bool(byte_level[0].get("use_regex", True))
        expression = _GPT2 if by_regex and not splits else "" if by_regex else pattern
        alone = bool(digits) and all(step.get("individual_digits") for step in digits)
        found = CUTS.get((expression, alone))
        if found and (alone or not digits):
            return found
    raise _refused(f"a BPE tokenizer that cuts text by {json.dumps(steps)}")


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a part of tokenizer.json: of its sequence, itself, or none."""
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _refused(what: str) -> UserError:
    known = ", ".join(CUTS.values())
    return UserError(
        f"gguf: {what} has no counterpart in llama.cpp that this export knows: byte-level BPE cut like {known}, or"
        " SentencePiece BPE with bytes. Export to granite, and convert that with llama.cpp's own script"
    )
