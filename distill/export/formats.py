"""The formats a student can be exported to: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What the user chose; a format reads what concerns it.

    Attributes:
        verify: load what was written and compare its logits with ours.
        outtype: how ``gguf`` stores matrices: ``"f32"``, ``"f16"`` or ``"q8_0"``.
        state: numbers of state a mixer's head has in ``gguf``, zeros added; None for as many as it has.
        quantise: ``"int8"`` to store linear layers so, where the format is a folder of transformers.
        eval_text: what quantising is measured on; None for the run's held-out text.
        base_model: the teacher's Hub id, for the model card.
        push: ORG/NAME on the Hub to upload to; None touches no network.
        private: make that repository private.
    """

    verify: bool = True
    outtype: str = "f16"
    state: int | None = None
    quantise: str | None = None
    eval_text: Path | None = None
    base_model: str | None = None
    push: str | None = None
    private: bool = False


Format = Callable[[Path, Path, Options], list[str]]
"""Writes the student in the first folder into the second one, which is empty; lines to tell the user.

It raises ``UserError``, before it writes, for a student that the format cannot say.
"""


def _granite(student: Path, out: Path, options: Options) -> list[str]:
    from distill.export.native import write_granite

    return write_granite(student, out, options)


def _bamba(student: Path, out: Path, options: Options) -> list[str]:
    from distill.export.native import write_bamba

    return write_bamba(student, out, options)


def _gguf(student: Path, out: Path, options: Options) -> list[str]:
    from distill.export.llama_cpp_file import write_gguf

    return write_gguf(student, out, options)


def _standalone(student: Path, out: Path, options: Options) -> list[str]:
    from distill.export.standalone import write_standalone

    return write_standalone(student, out, options)


FORMATS: dict[str, Format] = {"granite": _granite, "bamba": _bamba, "gguf": _gguf, "standalone": _standalone}
