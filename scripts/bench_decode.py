"""Tokens a second and bytes of cache while generating: a teacher, its hybrid with 1 in 8 layers kept, its all-Mamba.

    python -m scripts.bench_decode                                  # Llama-shaped, 8 layers, contexts 1K to 128K, CPU
    python -m scripts.bench_decode --kv-heads 4 --batch 4           # grouped queries; several sequences at once
    python -m scripts.bench_decode --device cuda --dtype bfloat16 --layers 32 --compile

All three run in one runtime: the same transformers class but for the mixers, the same loop of greedy steps (forward of
one token with a cache, argmax), the same kind of cache, threads and dtype. Two kinds are measured, since they cost an
attention layer differently: ``dynamic``, the default of ``generate``, copies all keys and values at every token to make
room for one more; ``static`` writes into room allocated beforehand.

Weights are random. A long context is not read but put in place: the mixers read a prompt of 64 tokens, which gives them
states like any other, and then the keys and values of attention layers are filled with noise and all counts set to the
context. What a step costs depends on sizes, not on values. ``most ×`` is what the speed-up over the teacher would be if
a step cost nothing but reading its weights and its cache once: both models read their weights, whatever the context, so
a hybrid with 1 layer in 8 comes near 8 only where caches are much larger than weights. ``MiB`` is what a cache holds,
``%`` of what the teacher's holds.

Contenders take turns in blocks of steps; medians of blocks. In the last table the all-Mamba student runs against itself
at all contexts.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from distill.cache import CountingMixerCacheLayer, MixerCacheLayer, cache_nbytes
from distill.conversion import plan, unset_model
from distill.layout import evenly_spaced
from distill.programs import report_user_errors
from distill.student import is_student, mixers_of
from eval.timing import decoding, prefill, seconds
from scripts.llama_shape import LlamaShape
from scripts.measure import device_and_dtype, record, require_file, show

PROMPT = 64
KEPT = 8
"""One layer in so many keeps attention."""
GiB = 2**30


@dataclass(frozen=True)
class Run:
    """What all contenders have in common."""

    batch: int
    steps: int
    blocks: int
    compiled: bool

    def room(self) -> int:
        """Tokens that a cache takes up in all blocks, the one of warming up included."""
        return self.steps * (self.blocks + 2)


@dataclass(frozen=True)
class Row:
    """One contender at one context; None where it was not run."""

    model: str
    cache: str
    context: int
    tokens_per_second: float | None
    cache_bytes: int
    read_bytes: int


@report_user_errors()
def main(
    context: Annotated[list[int] | None, typer.Option(help="Tokens already read; may be given again.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 1024,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 8,
    heads: Annotated[int, typer.Option(help="Query heads of the teacher.")] = 16,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads of the teacher.")] = 16,
    intermediate: Annotated[int, typer.Option(help="Width of the MLPs.")] = 2816,
    vocab: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 32000,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="On a CPU.")] = 1,
    steps: Annotated[int, typer.Option(help="Tokens in a block.")] = 4,
    blocks: Annotated[int, typer.Option(help="Timed blocks of each.")] = 7,
    memory: Annotated[float, typer.Option(help="GiB that weights and one context's caches may take.")] = 5.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the step, with static caches only.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the figures here, as JSON.")] = None,
) -> None:
    """Measure all contenders at all contexts and print tables."""
    require_file(output)
    place, precision = device_and_dtype(device, dtype, ("float32", "bfloat16", "float16"))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    shape, run = LlamaShape(hidden, layers, heads, kv_heads, intermediate, vocab), Run(batch, steps, blocks, compiled)
    contexts = context or [1024, 4096, 32768, 131072]
    models = contenders(shape, precision, place)
    rows = [
        row
        for kind in (["static"] if compiled else ["static", "dynamic"])
        for length in contexts
        for row in compare(models, kind, length, run, int(memory * GiB))
    ]
    alone = constancy(models["all-Mamba"], contexts, run)
    title = f"{layers} layers × {hidden}, {heads} heads over {kv_heads}, batch {batch}, {dtype}, {device}"
    show(title, ("model", "cache", "context", "tokens/s", "×", "most ×", "MiB", "%"), table(rows))
    first = alone[contexts[0]]
    lines = [(f"{length:,}", f"{speed:.1f}", f"{100 * (speed / first - 1):+.1f}%") for length, speed in alone.items()]
    show("all-Mamba beside itself", ("context", "tokens/s", f"to {contexts[0]:,}"), lines)
    if output:
        figures = {"rows": [asdict(row) for row in rows], "all_mamba_tokens_per_second": alone}
        record(output, {"shape": asdict(shape), "run": asdict(run), "dtype": dtype, "device": device, **figures})


def contenders(shape: LlamaShape, dtype: torch.dtype, device: torch.device) -> dict[str, PreTrainedModel]:
    """Teacher, hybrid and all-Mamba student; what they have in common lies in memory once."""
    teacher = unset_model(shape.config(), dtype).eval()
    models = {"teacher": teacher}
    kept = evenly_spaced(shape.layers // KEPT, shape.layers)
    for name, keep in (("hybrid", kept), ("all-Mamba", [])):
        models[name] = unset_model(plan(shape.config(), keep_attention=keep), dtype).eval()
    for model in models.values():
        model.to(device)
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        model.load_state_dict(teacher.state_dict(), strict=False, assign=True)
    return models


def compare(models: dict[str, PreTrainedModel], kind: str, context: int, run: Run, memory: int) -> Iterator[Row]:
    """One row a contender; those whose cache does not fit are left out of the run, not of the table."""
    weights = {tensor.data_ptr(): tensor.nbytes for model in models.values() for tensor in model.parameters()}
    sizes = {name: planned_bytes(model, context, run.batch) for name, model in models.items()}
    free, caches = memory - sum(weights.values()), {}
    for name in sorted(models, key=lambda name: sizes[name]):
        if sizes[name] < free:
            caches[name] = filled(models[name], kind, context, run)
            free -= sizes[name]
    torch._dynamo.reset()  # what was compiled for other contexts counts against the versions that it keeps
    calls = {name: block(models[name], caches[name], run) for name in models if name in caches}
    times = seconds(calls, run.blocks)
    for name, model in models.items():
        speed = run.batch * run.steps / times[name] if name in times else None
        held = cache_nbytes(caches[name]) if name in caches else sizes[name]
        yield Row(name, kind, context, speed, held, held + read_weights(model))
    del calls, caches
    gc.collect()


def constancy(model: PreTrainedModel, contexts: list[int], run: Run) -> dict[int, float]:
    """Tokens a second by context, of contexts that take turns."""
    calls = {str(length): block(model, filled(model, "static", length, run), run) for length in contexts}
    times = seconds(calls, 2 * run.blocks)
    return {length: run.batch * run.steps / times[str(length)] for length in contexts}


def filled(model: PreTrainedModel, kind: str, context: int, run: Run) -> Cache:
    """A cache as if ``context`` tokens had been read, with room for the tokens of all blocks."""
    config: Any = model.config
    if kind == "static":
        cache: Cache = StaticCache(config=config, max_cache_len=max(context, PROMPT) + 2 * run.room())
    else:
        cache = DynamicCache(config=config)
    prompt = torch.randint(0, config.vocab_size, (run.batch, PROMPT), device=model.device)
    prefill(model, prompt, cache)
    for layer in cache.layers:
        if isinstance(layer, CountingMixerCacheLayer):
            layer.cumulative_length.fill_(context)
        elif not isinstance(layer, MixerCacheLayer):
            fill_keys_and_values(layer, context)
    assert cache.get_seq_length() == context
    return cache


def fill_keys_and_values(layer: Any, context: int) -> None:
    """Noise for every token of the context."""
    if hasattr(layer, "max_cache_len"):
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    else:
        batch, heads, _, width = layer.keys.shape
        layer.keys = layer.keys.new_empty(batch, heads, context, width).normal_()
        layer.values = layer.values.new_empty(batch, heads, context, width).normal_()


def block(model: PreTrainedModel, cache: Cache, run: Run) -> Callable[[], Tensor]:
    """A call that generates ``run.steps`` tokens behind what the cache holds."""
    graph_mode = "reduce-overhead" if model.device.type == "cuda" else None
    step: Any = torch.compile(model.__call__, fullgraph=True, mode=graph_mode) if run.compiled else model
    token_B1 = torch.zeros(run.batch, 1, dtype=torch.long, device=model.device)
    return decoding(step, token_B1, cache, run.steps)


def planned_bytes(model: PreTrainedModel, context: int, batch: int) -> int:
    """What a cache will hold, known before there is one."""
    config: Any = model.config
    mixers = mixers_of(model) if is_student(model) else {}
    per_token = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    states = sum(mixer.state_bytes(model.dtype) for mixer in mixers.values())
    return batch * ((config.num_hidden_layers - len(mixers)) * per_token * context + states)


def read_weights(model: PreTrainedModel) -> int:
    """Bytes of weights that a step reads: all but the table of embeddings."""
    table = model.get_input_embeddings().weight
    return sum(parameter.nbytes for parameter in model.parameters() if parameter is not table)


def table(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """Rows as words, beside the teacher's of the same cache and context."""
    teachers = {(row.cache, row.context): row for row in rows if row.model == "teacher"}
    for row in rows:
        teacher = teachers[row.cache, row.context]
        ran = row.tokens_per_second is not None and teacher.tokens_per_second is not None
        yield (
            row.model,
            row.cache,
            f"{row.context:,}",
            "does not fit" if row.tokens_per_second is None else f"{row.tokens_per_second:.2f}",
            f"{row.tokens_per_second / teacher.tokens_per_second:.2f}" if ran else "",  # type: ignore[operator]
            f"{teacher.read_bytes / row.read_bytes:.2f}",
            f"{row.cache_bytes / 2**20:,.1f}",
            f"{100 * row.cache_bytes / teacher.cache_bytes:.1f}",
        )


if __name__ == "__main__":
    typer.run(main)
