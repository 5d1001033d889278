"""The model card: README.md with the metadata that the Hub reads, written from the records of the run.

Every number is read from a record, measured by the export itself, or computed from the config, and the card says
which. What nobody recorded is said to be unknown.
"""

import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from distill import marked_yaml
from distill.conversion import CONTEXTS
from distill.evaluation import perplexity_ratio
from distill.export.account import CONVERT, Account
from distill.export.footprint import Footprint, footprint_of
from distill.export.metadata import metadata
from distill.export.usage import how_to_load
from distill.export.written import Written
from distill.layout import ATTENTION, NAMES, WINDOWED, kept_heads
from distill.standalone import package_version
from distill.units import count, duration, size
from distill.vision import is_vision

CARD = "README.md"
UNKNOWN = "unknown: fill in"


def write_card(folder: Path, account: Account, written: Written) -> Path:
    """Write README.md into ``folder``, replacing one that is there."""
    path = folder / CARD
    path.write_text(str(make_card(account, written)), encoding="utf-8")
    return path


def make_card(account: Account, written: Written) -> ModelCard:
    """The card as huggingface_hub reads it back."""
    sections = [
        _introduction(account, written),
        _section("How to load it", _loading(account, written)),
        _section("What it is", _architecture(account, written, footprint_of(account.config))),
        _section("How well it does its teacher's work", _quality(account)),
        _section("What the quantised weights cost", _bullets(written.quantised.told()) if written.quantised else ""),
        _section("What it remembers", _footprint(account, footprint_of(account.config))),
        _section("How it was made", _making(account)),
        _section("Limits", _bullets(_limits(account))),
        _section("Licence", _licence(account, written)),
        _section("Versions", _versions(account)),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{metadata(account, written).to_yaml()}\n---\n\n{body}\n")


def _introduction(account: Account, written: Written) -> str:
    layout = account.config.distill["layers"]
    mixers = [kind for kind in layout if kind != ATTENTION]
    what = " and ".join(NAMES.get(kind, kind) for kind in dict.fromkeys(mixers)) or "attention"
    kept = [str(index) for index, kind in enumerate(layout) if kind == ATTENTION]
    layers = (
        f"{len(mixers)} of its {len(layout)} layers are {what} layers; attention is kept in layer {', '.join(kept)}"
        if kept and mixers
        else f"all of its {len(layout)} layers are {what} layers"
    )
    if heads := sum(map(len, kept_heads(account.config).values())):
        layers += f"; beside them {heads} single attention head{'s are' if heads > 1 else ' is'} kept"
    kind = "A hybrid of state-space layers and attention" if kept and mixers else "A language model"
    text = f"# {written.name}\n\n{kind}, distilled from {_teacher(account)}: {layers}."
    warning = _warning(account)
    return f"{text}\n\n> **{warning}**" if warning else text


def _teacher(account: Account) -> str:
    teacher = account.teacher
    if teacher.name is None:
        return "a Transformer whose name was not recorded"
    return f"[{teacher.name}](https://huggingface.co/{teacher.name})" if teacher.on_hub else f"`{teacher.name}`"


def _warning(account: Account) -> str | None:
    """What a reader must know before anything else."""
    if account.stages and not account.trained:
        return "Not trained: these are the weights right after conversion. What the model says makes no sense yet."
    if not account.stages:
        return "No record of any training lies beside this model: it may be untrained, straight from a conversion."
    missing = [stage for stage in account.planned if stage not in {record.stage for record in account.stages}]
    if missing:
        return f"Not finished: its recipe goes on with {', '.join(missing)}."
    return None


def _architecture(account: Account, written: Written, footprint: Footprint) -> str:
    config: Any = account.config
    text = config.get_text_config()
    dtype = "int8 linear layers, the rest " if written.quantised else ""
    rows = {
        "family": config.distill["teacher"],
        "parameters": f"{count(footprint.parameters)} ({footprint.parameters:,})",
        "stored as": f"{written.format}, {dtype}{_dtype(config)}, {size(written.n_bytes)}",
        "layers": ", ".join(f"{kind} × {len(list(run))}" for kind, run in groupby(config.distill["layers"])),
        "width; vocabulary": f"{text.hidden_size}; {text.vocab_size:,}",
        **{a: _a_layer(kind, config) for a, kind in _kinds_to_tell(config).items()},
        "context": f"{_trained_on(account)}; the configuration allows {text.max_position_embeddings:,} tokens",
    }
    return table(["", ""], rows.items())


def _kinds_to_tell(config: Any) -> dict[str, str]:
    """Which kinds of layers are told of, by what a row calls one; a layer behind a window is a mixer where all are."""
    mixers = [kind for kind in config.distill["layers"] if kind != ATTENTION] or ["mamba2"]
    first = next((kind for kind in mixers if kind != WINDOWED), WINDOWED)
    told = {"a mixer": first}
    return told | {"a window": WINDOWED} if WINDOWED in mixers and first != WINDOWED else told


def _a_layer(kind: str, config: Any) -> str:
    mixer = config.distill["mixer"]
    if kind == WINDOWED:
        heads = f"{config.get_text_config().num_attention_heads} heads of {mixer['head_dim']} channels"
        return f"{heads} × the first {mixer['sinks']} and the last {mixer['window']} tokens"
    return f"{mixer['n_heads']} heads of {mixer['head_dim']} channels × {mixer['state_dim']} states"


def _dtype(config: Any) -> str:
    return str(config.dtype or "float32").removeprefix("torch.")


def _trained_on(account: Account) -> str:
    block = (account.recipe or {}).get("data", {}).get("block")
    return f"trained on sequences of {block:,} tokens" if block and account.trained else "length trained on: unknown"


def _quality(account: Account) -> str:
    """The student, its teacher, and the stages before, as the run measured them."""
    if account.evaluation is None:
        return "Nothing was measured, or its record does not lie beside this model."
    teacher_loss = account.evaluation.metrics.teacher_loss
    rows = []
    if teacher_loss is not None:
        rows.append(["teacher", f"{teacher_loss:.4f}", f"{math.exp(teacher_loss):.2f}", "1.000", "", ""])
    for record in account.stages:
        found = account.evaluations.get(record.stage)
        if found is None:
            continue
        metrics, bold = found.metrics, "**" if record is account.stages[-1] else ""
        ratio = "" if teacher_loss is None else f"{perplexity_ratio(teacher_loss, metrics.loss):.3f}"
        numbers = [f"{metrics.loss:.4f}", f"{metrics.perplexity:.2f}", ratio]
        numbers += ["" if metrics.kl is None else f"{metrics.kl:.4f}"]
        numbers += ["" if metrics.agreement is None else f"{metrics.agreement:.1%}"]
        heading = "conversion" if record.stage == CONVERT else record.stage
        rows.append([f"{bold}after {heading}{bold}", *numbers])
    tokens = account.evaluation.metrics.tokens
    source = ", ".join(account.sources) or "the run's text"
    head = ["", "loss", "perplexity", "× teacher", "KL", "top-1 agreement"]
    return (
        f"{tokens:,} held-out tokens of {source}, which no stage was trained on. Loss and KL(teacher ‖ student) are in"
        " nats per token, agreement is the share of positions where both find the same token likeliest.\n\n"
        + table(head, rows)
    )


def _footprint(account: Account, footprint: Footprint) -> str:
    rows = [
        [
            f"{tokens:,}",
            size(footprint.student_bytes(tokens)),
            size(footprint.teacher_bytes(tokens)),
            count(footprint.student_operations(tokens)),
            count(footprint.teacher_operations(tokens)),
        ]
        for tokens in _contexts(account)
    ]
    head = ["tokens of context", "cache", "teacher's cache", "operations", "teacher's operations"]
    dtype = _dtype(account.config)
    return (
        f"Of one sequence: {size(footprint.state_bytes)} at every length (a mixer's state in fp32, all else in {dtype})"
        f", and keys and values ({dtype}) of the layers that keep attention. Operations are those of a generated token"
        " that depend on the kind of layer: scan, scores and weighted sums. Computed from the configuration, not"
        " measured."
        f"\n\n{table(head, rows)}"
    )


def _contexts(account: Account) -> list[int]:
    """As long as the configuration allows, and that length itself."""
    longest = account.config.get_text_config().max_position_embeddings
    return [*(tokens for tokens in CONTEXTS if tokens < longest), longest]


def _making(account: Account) -> str:
    parts = []
    if account.stages:
        rows = [
            [
                record.stage,
                count(record.tokens),
                f"{record.steps:,}",
                "" if record.loss_start is None else f"{record.loss_start:.4g}",
                "" if record.loss_end is None else f"{record.loss_end:.4g}",
                duration(record.seconds),
            ]
            for record in account.stages
        ]
        parts.append(table(["stage", "tokens", "steps", "loss at its start", "at its end", "time"], rows))
        parts.append("Each stage has an objective of its own, so losses compare within a row only.")
        if not account.whole:
            parts.append("The records of the stages before these do not lie beside this model.")
    else:
        parts.append("Not recorded.")
    parts.append(_data(account))
    if account.recipe is not None:
        recipe = marked_yaml.write(account.recipe).strip()
        parts.append(f"<details><summary>The recipe</summary>\n\n```yaml\n{recipe}\n```\n\n</details>")
    return "\n\n".join(part for part in parts if part)


def _data(account: Account) -> str:
    if account.data is None:
        return f"Text: {', '.join(account.sources)}." if account.sources else ""
    rows = [
        [name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.utf8_bytes:,}"]
        for name, split in account.data.splits.items()
    ]
    return (
        f"Text: {', '.join(account.sources)}; fingerprint of documents, tokenizer and options: "
        f"`{account.data.fingerprint}`.\n\n" + table(["", "documents", "tokens", "bytes"], rows)
    )


def _limits(account: Account) -> list[str]:
    lines = [warning] if (warning := _warning(account)) else []
    metrics = account.evaluation.metrics if account.evaluation else None
    if metrics and metrics.teacher_loss is not None and metrics.agreement is not None:
        lines.append(
            f"On text like its own, its perplexity is {perplexity_ratio(metrics.teacher_loss, metrics.loss):.3f} × the"
            f" teacher's, and at {1 - metrics.agreement:.1%} of positions its likeliest token is another. On other text"
            " more may be lost: nothing else was measured, no benchmark either."
        )
    if account.trained:
        lines.append(
            f"It was {_trained_on(account)}, {count(sum(record.tokens for record in account.trained))} tokens in all;"
            " beyond that length it was neither trained nor measured."
        )
    dropped = account.config.distill["mixer"].get("rope", "drop") == "drop"
    if dropped and getattr(account.config.get_text_config(), "rope_parameters", None):
        lines.append("Rotary positions are dropped from the converted layers; those that keep attention have them.")
    lines += [
        "A state of fixed size cannot hold a long text word for word: verbatim recall from far back is where such"
        " models fall behind attention first.",
        "Assisted (speculative) decoding is not possible: a state cannot be rolled back.",
        "What the teacher gets wrong, and any bias it has, carries over. Nothing was done about safety.",
    ]
    return lines


def _licence(account: Account, written: Written) -> str:
    told = account.teacher.licence
    if not told:
        return (
            f"{UNKNOWN}. The weights derive from the teacher's, whose licence applies; it was not found beside the"
            " teacher. Put it under `license` above before this is published."
        )
    link = f" ({told['license_link']})" if "license_link" in told else ""
    name = told.get("license_name", told["license"])
    code = " The code in this folder is Apache-2.0." if written.format == "standalone" else ""
    return f"{name}{link}, as the teacher's card says: the weights derive from it.{code}"


def _versions(account: Account) -> str:
    versions = {"distill-ssm (this export)": package_version()}
    if account.stages:
        versions |= account.stages[-1].versions
    return ", ".join(f"{name} {number}" for name, number in versions.items()) + "."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; numbers, in all columns but the first, to the right."""
    columns = list(head)
    ruler = ["---", *["---:" if any(columns) else "---"] * (len(columns) - 1)]
    lines = [columns, ruler, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _loading(account: Account, written: Written) -> str:
    text: Any = account.config.get_text_config()
    head_dim = getattr(text, "head_dim", None)
    return how_to_load(
        written.format,
        written.place,
        quantised=written.quantised is not None,
        file=written.file,
        images=is_vision(account.config),
        heads_fill_width=head_dim is None or head_dim * text.num_attention_heads == text.hidden_size,
    )


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
