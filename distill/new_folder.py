"""Where a model may be written: a new or empty folder, or one whose model may be replaced."""

from pathlib import Path

from distill.errors import UserError


def check_new_folder(out: Path, source: Path | None, kind: str, overwrite: bool) -> None:
    """Refuse to write where something is that was not meant to go.

    Args:
        out: where the model shall stand.
        source: what it is made from, if that is a folder.
        kind: what the source is called in messages, such as ``"teacher"``.
        overwrite: whether a model at `out` may be replaced.

    Raises:
        UserError: `out` is a file, the source itself, or not empty.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a new folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if source is not None and out.resolve() == source.resolve():
        raise UserError(f"{out} is the {kind} itself; give another folder")
    if not overwrite:
        raise UserError(f"{out} is not empty; give another folder, or --overwrite to replace the model in it")
    if not any(out.glob("config.json")) and not any(out.glob("*.gguf")):
        raise UserError(f"{out} holds something other than a model, which --overwrite does not replace")
