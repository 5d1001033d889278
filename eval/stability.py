"""How long a student's layers remember, whether a disturbance of their memory can grow, and how far one spreads.

python -m eval.stability runs/quickstart/logits teachers/stdlib-1m --text python-stdlib
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from distill.atomic import explained_full_disk
from distill.decoder import layers_of
from distill.errors import UserError
from distill.layout import ATTENTION, NAMES, mixer_layers
from distill.perturbation import deviations
from distill.programs import quiet_unless_watched, report_user_errors
from distill.stability import head_exponents, memory_tokens
from eval import options, words
from eval.findings import Fields, Findings, names_of, require_folder, write_findings
from eval.loading import Text, load_config, load_model, read_batches
from eval.memory_maps import memory_maps, without

KIND = "stability"


@report_user_errors()
def main(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders: students, their teacher.")],
    source: options.Source,
    block: options.Block = 1024,
    batch_size: options.BatchSize = 8,
    tokens: options.Tokens = 16_000,
    text_key: options.TextKey = "text",
    separator: options.Separator = None,
    output: Annotated[Path, typer.Option(help=f"Folder for {KIND}.json and a picture, {KIND}.png.")] = Path(
        "runs/stability"
    ),
    epsilon: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="Size of a disturbance, relative to what is disturbed.")
    ] = 1e-3,
    draws: Annotated[int, typer.Option(min=1, help="Disturbances of each sequence.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Where, in which layer and in which direction is disturbed.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Measure each MODEL on a text, in float32: Lyapunov exponents, memory in tokens, and what a disturbance does.

    Layers that keep attention, and a teacher's, have no state and so no exponent. Disturbed are the converted layers;
    of a teacher those that any of the students has converted.
    """
    quiet_unless_watched()
    names = names_of(models)
    require_folder(output)
    converted = _converted(names)
    text = Text(source, block, batch_size, tokens, text_key, separator)
    found: dict[str, Fields] = {}
    for name, path in names.items():
        batches = read_batches(text, path)
        model = load_model(path, device).float()
        disturbed = _disturbed(converted, name, len(layers_of(model)))
        layers = _layers(model, head_exponents(model, batches))
        spans = deviations(model, batches, disturbed, epsilon=epsilon, draws=draws, seed=seed)
        found[name] = {
            "layers": layers,
            "disturbed": disturbed,
            "deviations": [asdict(span) for span in spans],
        }
        print(_told(name, found[name]), flush=True)
    settings = {
        "source": list(source),
        "block": block,
        "tokens": tokens,
        "epsilon": epsilon,
        "draws": draws,
        "seed": seed,
    }
    file = write_findings(output, Findings(KIND, names, settings, found))
    with explained_full_disk(output):
        maps = {name: one["layers"] for name, one in found.items() if any("memory" in layer for layer in one["layers"])}
        if maps:
            memory_maps(maps, output / f"{KIND}.png")
    print(f"{file}{f' and {KIND}.png beside it' if maps else ''}")


def _converted(names: dict[str, str]) -> dict[str, list[int]]:
    """The converted layers of every model, by its config.

    Raises:
        UserError: none has any.
    """
    configs = {name: load_config(path) for name, path in names.items()}
    found = {
        name: list(mixer_layers(config)) if getattr(config, "distill", None) else [] for name, config in configs.items()
    }
    if not any(found.values()):
        raise UserError(
            f"{words.listed(list(names))}: no layer of them is converted, so that nothing has a state; give a student's"
            " folder, and its teacher beside it to compare with"
        )
    return found


def _disturbed(converted: dict[str, list[int]], name: str, depth: int) -> list[int]:
    """A model's own converted layers; where it has none those of the others, or all it has."""
    others = {layer for layers in converted.values() for layer in layers if layer < depth}
    return converted[name] or sorted(others) or list(range(depth))


def _layers(model: PreTrainedModel, exponents: dict[int, list[float]]) -> list[Fields]:
    """A record a layer: what mixes there, and of a mixer λ of the layer and of each head, and memory in tokens."""
    layers: list[Fields] = []
    layout = getattr(model.config, "distill", None)
    for index in range(len(layers_of(model))):
        heads = exponents.get(index)
        kind = ATTENTION if layout is None else layout["layers"][index]
        if heads is None:
            layers.append({"layer": index, "kind": kind})
        else:
            memory = [memory_tokens(exponent) for exponent in heads]
            layers.append({"layer": index, "kind": kind, "exponent": max(heads), "exponents": heads, "memory": memory})
    return layers


def _told(name: str, found: Fields) -> str:
    """Lines about one model."""
    lines = [f"{name}", "  layer  mixer             largest exponent  memory in tokens, by head"]
    for layer in found["layers"]:
        kind = NAMES.get(layer["kind"], layer["kind"])
        if "exponent" not in layer:
            lines.append(f"  {layer['layer']:<7}{kind:<18}{without(layer)}")
        else:
            memory = "  ".join(words.plain(tokens, 0) for tokens in sorted(layer["memory"]))
            lines.append(f"  {layer['layer']:<7}{kind:<18}{words.plain(layer['exponent'], 5):>16}  {memory}")
    if spans := [span for span in found["deviations"] if span["first"]]:
        largest = max(span["largest"] for span in spans)
        lines.append(
            f"  a disturbance of 1: {words.plain(spans[0]['mean'])} one token on, {words.plain(spans[-1]['mean'])}"
            f" from {spans[-1]['first']} tokens on (largest {words.plain(largest)})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
