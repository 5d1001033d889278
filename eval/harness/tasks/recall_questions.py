"""The recall tasks for lm-evaluation-harness, drawn when they are asked for: nothing is downloaded.

    lm_eval --model hf --model_args pretrained=FOLDER --include_path eval/harness/tasks --tasks recall,recall_written
        --metadata '{"items": 8, "length": 512}'

``recall`` counts answers that are likelier than others, ``recall_written`` those that the model writes. The metadata
says how many ``items`` and ``samples``, how long (``length``, in tokens of the model's tokenizer) and which ``seed``.
"""

from functools import partial
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from distill.recall.questions import words
from distill.recall.tasks import text_questions, tokens_by


def questions(
    task: str,
    items: int = 4,
    length: int = 0,
    samples: int = 64,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **_others: Any,
) -> dict[str, Dataset]:
    """A split ``test`` of one task; the others in the metadata are the harness's own.

    Args:
        task, items, length, samples, seed: as ``distill.recall.tasks.row_examples`` has them.
        tokenizer, pretrained: the folder of the tokenizer that ``length`` counts by; words without.
    """
    folder = tokenizer or pretrained
    measure = tokens_by(AutoTokenizer.from_pretrained(folder)) if folder and length else words
    drawn = text_questions(task, items, length, samples=samples, seed=seed, measure=measure)
    rows = [
        {"prompt": one.prompt, "choices": list(one.choices), "label": one.label, "answer": one.answer} for one in drawn
    ]
    return {"test": Dataset.from_list(rows)}


def written(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether what was written begins with the answer, and with nothing longer."""
    text = results[0].strip()
    rest = text.removeprefix(doc["answer"])
    return {"written": float(rest != text and not rest[:1].isalnum())}


associative = partial(questions, "associative")
phonebook = partial(questions, "phonebook")
passkey = partial(questions, "passkey")
copying = partial(questions, "copying")
parity = partial(questions, "parity")
permutation = partial(questions, "permutation")
