"""How fast models read and write, and what they hold in memory, by length of context; side by side in one runtime.

python -m eval.speed teachers/stdlib-1m runs/quickstart/logits --context 512 --context 2048
python -m eval.speed TEACHER STUDENT TEACHER@like=STUDENT --context 4096 --chunk 512      # a windowed teacher too

All models run as they would for a user: their transformers classes, one dynamic cache each, the same prompts, greedy
steps. Of each context the prompts are read first, models taking turns, and then tokens are written behind them, models
taking turns again; figures are medians over runs. Bytes are those that the caches hold when the prompt has been read.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from distill import units
from distill.cache import MixerCacheLayer, cache_nbytes
from distill.decoder import learns_positions
from distill.errors import UserError
from distill.evaluating import evaluating
from distill.programs import quiet_unless_watched, report_user_errors
from eval import options, words
from eval.findings import Findings, names_of, require_folder, write_findings
from eval.loading import load_model
from eval.sections.speed import sentences
from eval.timing import circumstances, decoding, prefill, seconds

KIND = "speed"


@dataclass(frozen=True)
class Row:
    """One model at one context; tokens are those of all sequences together, and so are bytes.

    Attributes:
        prefill, decode: tokens a second, of reading the prompt and of writing behind it.
        state_bytes: what mixers remember.
        key_value_bytes: what attention layers do.
    """

    model: str
    context: int
    prefill: float
    decode: float
    state_bytes: int
    key_value_bytes: int


@dataclass(frozen=True)
class Settings:
    """How contexts are read and how much is written behind them."""

    batch: int = 1
    chunk: int | None = None
    steps: int = 16
    runs: int = 5

    def room(self, context: int) -> int:
        """Tokens that a model sees at most: every run, and the one of warming up, writes behind the one before."""
        return context + self.steps * (self.runs + 1)


@report_user_errors()
def main(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders; ratios are to the first, a teacher as a rule.")
    ],
    context: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of the prompt; may be given again.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt a forward; all by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens written in a run.")] = 16,
    runs: Annotated[int, typer.Option(min=1, help="Runs that count; medians are over them.")] = 5,
    output: Annotated[Path, typer.Option(help=f"Folder for {KIND}.json.")] = Path("runs/speed"),
    device: options.Device = "auto",
) -> None:
    """Measure each MODEL's tokens a second and its bytes of state and cache behind contexts of several lengths."""
    quiet_unless_watched()
    contexts, settings = sorted(set(context or (512, 2048))), Settings(batch, chunk, steps, runs)
    names = names_of(models)
    require_folder(output)
    loaded = {name: load_model(path, device) for name, path in names.items()}
    for name, model in loaded.items():
        _require_room(name, model, settings.room(contexts[-1]))
    rows: list[Row] = []
    for length in contexts:
        found = measure(loaded, length, settings)
        rows += found
        print(_told(found), flush=True)
    results = {"rows": [asdict(row) for row in rows], "measured_on": circumstances()}
    print("\n".join(sentences(list(names), results)))
    settings_given = {"contexts": contexts, "device": str(next(iter(loaded.values())).device)} | asdict(settings)
    settings_given["dtypes"] = {name: str(model.dtype).removeprefix("torch.") for name, model in loaded.items()}
    print(write_findings(output, Findings(KIND, names, settings_given, results)))


def measure(models: dict[str, PreTrainedModel], context: int, settings: Settings) -> list[Row]:
    """One row a model."""
    caches: dict[str, Cache] = {}
    with evaluating(*models.values()):
        reading = {name: _reading(name, model, context, settings, caches) for name, model in models.items()}
        read = seconds(reading, settings.runs)
        held = {name: held_bytes(cache) for name, cache in caches.items()}
        writing = {name: _writing(model, caches[name], settings) for name, model in models.items()}
        written = seconds(writing, settings.runs)
    tokens = {"prefill": settings.batch * context, "decode": settings.batch * settings.steps}
    return [
        Row(name, context, tokens["prefill"] / read[name], tokens["decode"] / written[name], *held[name])
        for name in models
    ]


def held_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of mixers' states, and of keys and values."""
    states = sum(layer.nbytes() for layer in cache.layers if isinstance(layer, MixerCacheLayer))
    return states, cache_nbytes(cache) - states


def _reading(name: str, model: Any, context: int, settings: Settings, caches: dict[str, Cache]) -> Callable[[], Tensor]:
    """A call that reads the prompt into a new cache, and leaves that in ``caches``."""
    chooser = torch.Generator().manual_seed(context)
    vocabulary = model.config.get_text_config().vocab_size
    ids_BT = torch.randint(0, vocabulary, (settings.batch, context), generator=chooser).to(model.device)

    def read() -> Tensor:
        caches.pop(name, None)  # before the new one grows
        caches[name] = DynamicCache(config=model.config)
        return prefill(model, ids_BT, caches[name], settings.chunk)

    return read


def _writing(model: Any, cache: Cache, settings: Settings) -> Callable[[], Tensor]:
    token_B1 = torch.zeros(settings.batch, 1, dtype=torch.long, device=model.device)
    return decoding(model, token_B1, cache, settings.steps)


def _require_room(name: str, model: PreTrainedModel, tokens: int) -> None:
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if learns_positions(model) and known is not None and tokens > known:
        raise UserError(
            f"{name} knows {known} positions, and {tokens} would be read and written; give smaller contexts"
        )


def _told(rows: Sequence[Row]) -> str:
    """A table of one context."""
    first, width = rows[0], max(len(row.model) for row in rows)
    lines = [
        f"{first.context:,} tokens of context",
        f"{'':{width}}  prefill/s      ×  decode/s      ×      bytes      %",
    ]
    for row in rows:
        ours, theirs = (one.state_bytes + one.key_value_bytes for one in (row, first))
        share = words.percent(ours / theirs)
        lines.append(
            f"{row.model:{width}}{row.prefill:11,.0f}{row.prefill / first.prefill:7.2f}"
            f"{row.decode:10,.1f}{row.decode / first.decode:7.2f}{units.size(ours):>11}{share:>7}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
