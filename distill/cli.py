"""The `distill` command: plan, convert, generate, export, consolidate, doctor.

Training is not here: the stages are programs of the checkout, ``python -m stages.run recipes/NAME.yaml``.
"""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from distill.errors import UserError
from distill.programs import quiet_unless_watched, report_user_errors

app = typer.Typer(
    name="distill",
    help="Turn a pretrained Transformer into a Mamba-2 model or a hybrid, and use the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    # Our own mistakes keep Python's traceback.
    pretty_exceptions_enable=False,
)


class Bidirectional(StrEnum):
    """What `distill convert` does with a teacher that reads in both directions."""

    refuse = "refuse"
    causal = "causal"


AsJson = Annotated[bool, typer.Option("--json", help="Print plain JSON instead of tables.")]


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that replace those of the recipe."),
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Devices, with a process on each; 1 unless given.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="An accelerator by name: a100, h100, h200, b200, mi300x, l40s, rtx4090. Its memory is known, its speed"
            " is taken to be 40% of the data sheet's peaks."
        ),
    ] = None,
    device_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Such as 80GB or 79GiB.")] = None,
    flops: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Operations a second that a device achieves, such as 400T.")
    ] = None,
    bandwidth: Annotated[
        float, typer.Option(metavar="GB/S", help="What a device sends to its peers in a second.", min=0.001)
    ] = 200.0,
    price: Annotated[
        float | None, typer.Option(metavar="AMOUNT", help="Of a device-hour, in any currency.", min=0)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a recipe and show what its run will take, without loading a weight.

    Layers, parameters, cache sizes, steps, memory and time of every stage, on one process of this machine, whose
    speed is measured for a second. With devices: which engine fits, tokens a day and cost. Evaluation comes on top.
    The teacher may be a folder with a config.json alone.

    Example: `distill plan recipes/shapes/llama-3.1-8b.yaml --devices 8 --device h100 --price 2.50`
    """
    from distill.checks import check
    from distill.machine import wanted
    from distill.plan import make_plan, prepared_tokens
    from distill.plan_view import WIDTH, render
    from distill.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    machine = wanted(devices, device, device_memory, flops, bandwidth, price)
    facts = check(loaded, ranks=devices or 1, planning=True)
    made = make_plan(loaded, facts, training_tokens=prepared_tokens(loaded), wanted=machine)
    _show(made.to_json() if as_json else render(made), WIDTH)


@app.command()
def convert(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="A Hugging Face folder, or a Hub id such as org/name.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must be new or empty.")],
    mixer: Annotated[
        str,
        typer.Option(
            help="In attention's place: mamba2, discrete_mamba2, gated_deltanet, based, hedgehog, sliding_window."
        ),
    ] = "mamba2",
    keep_attention: Annotated[
        str, typer.Option(metavar="LAYERS", help="Layers that keep attention: 2,5 or a pattern such as mmma.")
    ] = "",
    keep_heads: Annotated[
        str, typer.Option(metavar="HEADS", help="Heads that keep attention beside their layer's mixer: 3:0+2,5:1.")
    ] = "",
    rope: Annotated[
        str, typer.Option(metavar="drop|keep", help="keep gives the mixers the teacher's rotary positions.")
    ] = "drop",
    seed: Annotated[int, typer.Option(help="Seeds what does not come from the teacher.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is already there.")] = False,
    bidirectional: Annotated[
        Bidirectional,
        typer.Option(help="Whether mixers may read one way what attention reads both ways."),
    ] = Bidirectional.refuse,
) -> None:
    """Turn a teacher into an untrained student, and report where its weights came from.

    The student is an ordinary Hugging Face folder. Its mixers start from the attention weights; what they say makes
    sense only after the stages have trained them.

    Example: `distill convert teachers/stdlib-1m students/hybrid --keep-attention 1,3`
    """
    quiet_unless_watched()
    from distill.conversion_view import render
    from distill.converting import convert_folder

    report = convert_folder(
        teacher,
        out,
        mixer=mixer,
        keep=keep_attention,
        heads=keep_heads,
        seed=seed,
        overwrite=overwrite,
        rope=rope,
        bidirectional=bidirectional.value,
    )
    _show(render(report))
    typer.echo(f"saved in {out}")


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A student or a teacher, such as runs/quickstart/logits.")
    ],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One or more texts to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seeds the samples.")] = 0,
    bos: Annotated[bool, typer.Option("--bos", help="Begin with the BOS token though the tokenizer does not.")] = False,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="An image the prompt is about; several by several.")
    ] = None,
) -> None:
    """Continue a text; a single one is printed as it is written, several run as one batch.

    With --image the prompt is a question to a vision-language model, and its answer is printed.

    Example: `distill generate runs/quickstart/logits "def main(" --temperature 0.8`
    """
    quiet_unless_watched()
    from distill.generation import answer, load
    from distill.generation import generate as generate_text
    from distill.processor import processor_for_images

    model, tokenizer = load(folder)
    if image:
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        answer(
            model,
            processor_for_images(folder, model.config),
            _only(prompts),
            image,
            max_new_tokens=max_new_tokens,
            stream=True,
            **settings,
        )
        return
    texts = generate_text(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        bos=bos,
        stream=True,
    )
    if len(texts) > 1:
        typer.echo("\n\n".join(texts))


def _only(prompts: list[str]) -> str:
    if len(prompts) > 1:
        raise UserError(f"{len(prompts)} prompts are given with --image; give one, and run the others by themselves")
    return prompts[0]


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A student, such as runs/quickstart/logits.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must be new or empty.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="granite, bamba, gguf or standalone.")],
    outtype: Annotated[str, typer.Option(help="How gguf stores matrices: f32, f16 or q8_0.")] = "f16",
    state: Annotated[
        int | None, typer.Option(help="State of a mixer's head in gguf, zeros added; llama.cpp on CUDA wants 128.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load what was written and compare its logits with ours.")
    ] = True,
    quantise: Annotated[
        str | None, typer.Option(metavar="SCHEME", help="int8: linear layers in 8 bits, and what that costs, measured.")
    ] = None,
    eval_text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure it on this text instead of the run's held-out text.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="The teacher's Hub id for the model card, if not recorded.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload the finished export to the Hub; else no network.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is already there.")] = False,
) -> None:
    """Write a student in a format that runs where this package is not installed.

    granite and bamba are classes of transformers (vLLM runs granite), gguf is llama.cpp's. What a format cannot say is
    refused before anything is written, each reason with its layer and the setting that would make it exportable.
    standalone says every student: it brings its own code. All come with a model card.

    Example: `distill export runs/mine/logits exported --to granite`
    """
    from transformers.utils import logging

    quiet_unless_watched()
    # That other classes run without their kernels here, where they are only compared, is nobody's concern.
    logging.set_verbosity_error()
    from distill.export.exporting import export_folder
    from distill.export.formats import Options

    options = Options(
        verify=verify,
        outtype=outtype,
        state=state,
        quantise=quantise,
        eval_text=eval_text,
        base_model=base_model,
        push=push,
        private=private,
    )
    report = export_folder(folder, out, to=to, options=options, overwrite=overwrite)
    typer.echo("\n".join([*report, f"saved in {out}"]))


@app.command()
def consolidate(
    checkpoint: Annotated[Path, typer.Argument(help="run_dir/training/STAGE/checkpoints/step-N.")],
    folder: Annotated[Path, typer.Argument(help="Where the student's folder shall stand; new or empty.")],
) -> None:
    """Make one Hugging Face folder of a checkpoint, in however many shards some engine wrote it.

    A stage that ends well does this by itself; it is for a student from the middle of a stage, such as the best one.
    """
    with report_user_errors():
        from distill.consolidation import consolidate as write

        quiet_unless_watched()
        write(checkpoint, folder)
        print(f"{folder}: the student at {checkpoint}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, the scan that will run, what can be installed, and free disk space.

    Example: `distill doctor --json > machine.json`
    """
    from distill.doctor import diagnose, render

    facts = diagnose()
    _show(facts if as_json else render(facts))


def _show(result: RenderableType | dict[str, Any], width: int | None = None) -> None:
    """Prints it; ``width`` is the number of columns where there is no terminal to ask."""
    if isinstance(result, dict):
        typer.echo(json.dumps(result, indent=1))
    else:
        Console(soft_wrap=False, width=None if sys.stdout.isatty() else width).print(result)


def main() -> None:
    """The entry point: a `UserError` is printed on one screen and ends it with exit code 2."""
    with report_user_errors():
        app(prog_name="distill")


if __name__ == "__main__":
    main()
