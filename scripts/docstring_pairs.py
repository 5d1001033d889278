"""A task that a model of a million parameters can learn and be shown examples of: what a function is for.

    def isleap(year):
        \"\"\"Return True for leap years.\"\"\"
           ↑ asked up to here, answered from here to the end of the line

Functions of one module have like names and are described in like words, so that examples from the same file help, as
worked examples help a larger model. Everything is in the running Python. A description begins with a letter, so that
byte-level tokenizers cut the text there in any case, whether it is read in one piece or in two.
"""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from distill.data import Document

LONGEST = 100
"""Characters of an asked line, or an answered one."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Pair:
    """A function up to its docstring, and the first line of that, quotes and end of line included."""

    asked: str
    answered: str

    def chat(self) -> dict[str, list[dict[str, str]]]:
        """As a row for fine-tuning."""
        told = (("user", self.asked), ("assistant", self.answered))
        return {"messages": [{"role": role, "content": content} for role, content in told]}


def pairs_of(document: Document) -> list[Pair]:
    """The described functions of a Python file, in order; none of a file that does not parse."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = (_pair(node) for node in sorted(functions, key=lambda node: node.lineno))
    return [pair for pair in found if pair is not None]


def shots(files: Iterable[Sequence[Pair]], most: int) -> list[list[Pair]]:
    """Runs of neighbours in one file, none in two of them: ``most`` examples and, last, one to be asked."""
    return [list(pairs[at : at + most + 1]) for pairs in files for at in range(0, len(pairs) - most, most + 1)]


def encoded(
    examples: Sequence[Pair], last: Pair, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of what a model reads, examples first, and of the answer that it should give to ``last``."""
    read = "".join(pair.asked + pair.answered for pair in examples) + last.asked
    prompt = tuple(tokenizer(read)["input_ids"])
    return prompt, tuple(tokenizer(last.answered, add_special_tokens=False)["input_ids"])


def _pair(node: ast.FunctionDef) -> Pair | None:
    told = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    asked = f"def {node.name}({ast.unparse(node.args)}):"
    if not told[:1].isalpha() or '"""' in told or "\\" in told or max(len(told), len(asked)) > LONGEST:
        return None
    return Pair(f'{asked}\n    """', f'{told}"""\n')
