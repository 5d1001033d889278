"""The report's charts: which series go where, and how they are called."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from distill import units
from eval import words
from eval.charts import Axis, Chart, Point, Series, byte_ticks, line_chart, smoothed, spans_decades, thinned
from eval.run_record import CONVERT, Memory, RunRecord, Stage

PALETTE = ("teacher", CONVERT, "mixing", "hidden", "logits")
MINIMISED = {
    "mixing": "distance of mixing matrices",
    "hidden": "distance of hidden states",
    "logits": "distillation loss",
}
MODELS = 8
"""Colours the page has for models side by side; the ninth has the first's again."""
CONTEXT_TICKS = (1024, 4096, 16384, 65536, 262144)


def colour(name: str) -> str:
    """The page's colour class of a model in the tables and charts."""
    return name if name in PALETTE else "other"


def model_colour(place: int) -> str:
    """The colour class of one model of several."""
    return f"{place % MODELS + 1}"


def closeness_charts(run: RunRecord) -> list[Chart]:
    """How KL and loss fell over the run, and how far each layer's output is from the teacher's."""
    return [
        _over_run(run, "kl", "KL from the teacher", "On held-out text over the run; lower is closer."),
        _over_run(run, "loss", "Loss on held-out text", "Over the run; the dashed line is the teacher."),
        _layer_chart(run),
    ]


def task_charts(run: RunRecord) -> list[Chart]:
    """What the recipe's tasks scored while stages trained, a chart a task."""
    return [
        _drawn(
            title,
            note,
            [
                Series(stage.heading, colour(stage.name), points, notes=_noted(stage.name, points))
                for stage, points in _by_stage(run, name)
            ],
        )
        for name, title, note in _tasks([run])
    ]


def task_charts_of_runs(runs: Mapping[str, RunRecord], colours: Mapping[str, str]) -> list[Chart]:
    """The same over several runs, a colour a run."""
    return [
        _drawn(
            title,
            note,
            [
                Series(of, colours[of], points, notes=_noted(of, points))
                for of, run in runs.items()
                if (points := [point for _, found in _by_stage(run, name) for point in found])
            ],
        )
        for name, title, note in _tasks(list(runs.values()))
    ]


def _tasks(runs: Sequence[RunRecord]) -> list[tuple[str, str, str]]:
    """Each task that was asked in training: its metric, and what its chart says."""
    names = dict.fromkeys(
        name for run in runs for stage in run.stages for _, values in stage.held_out for name in values
    )
    return [
        (name, f"Recall: {name.split('.')[1]}", "Answers written exactly, while it trained; higher is better.")
        for name in names
        if name.startswith("recall.") and name.endswith(".written")
    ]


def _noted(of: str, points: Sequence[Point]) -> list[str]:
    return [f"{of}, {words.amount(tokens)} tokens: {words.percent(value)}" for tokens, value in points]


def _drawn(title: str, note: str, series: Sequence[Series]) -> Chart:
    y = Axis("share written", lambda value: f"{100 * value:.0f}%", zero=True)
    return line_chart(title, note, series, Axis("training tokens", words.short, zero=True), y)


def training_charts(run: RunRecord) -> list[Chart]:
    """What each stage minimised."""
    return [_training_chart(stage) for stage in run.stages if stage.training]


def memory_chart(run: RunRecord) -> Chart:
    """Bytes of state and cache over context length."""
    assert run.memory is not None
    return _memory(run.memory, {"student": ("logits", run.memory)})


def memory_of_runs(runs: Mapping[str, RunRecord], colours: Mapping[str, str]) -> Chart:
    """The same for the students of several runs beside their teacher; no picture where none is known."""
    held = {name: (colours[name], run.memory) for name, run in runs.items() if run.memory}
    return _memory(next(iter(held.values()))[1], held) if held else Chart("", "", Markup(""))


def _memory(teacher: Memory, students: Mapping[str, tuple[str, Memory]]) -> Chart:
    contexts = [1024 * 2 ** (step / 2) for step in range(17)]
    series = [Series("teacher", "teacher", [(tokens, teacher.teacher(tokens)) for tokens in contexts], "dashed")]
    series += [
        Series(name, colour, [(tokens, held.student(tokens)) for tokens in contexts])
        for name, (colour, held) in students.items()
    ]
    return line_chart(
        "Memory for one sequence",
        "State and key–value cache, by tokens read.",
        series,
        Axis("tokens of context", lambda tokens: words.context(int(tokens)), log=True, ticks=CONTEXT_TICKS),
        Axis("bytes", units.size, log=True, ticks=byte_ticks(series)),
    )


def loss_charts(runs: Mapping[str, RunRecord], colours: Mapping[str, str]) -> list[Chart]:
    """KL and loss over the tokens of several runs of one teacher, a colour a run."""
    return [
        _side_by_side(runs, colours, "kl", "KL from the teacher", "On held-out text over each run; lower is closer."),
        _side_by_side(runs, colours, "loss", "Loss on held-out text", "Over each run; the dashed line is the teacher."),
    ]


def _side_by_side(runs: Mapping[str, RunRecord], colours: Mapping[str, str], name: str, title: str, note: str) -> Chart:
    series = []
    for run_name, run in runs.items():
        points = [point for _, points in _by_stage(run, name) for point in points]
        notes = [f"{run_name}, {words.amount(tokens)} tokens: {words.plain(value)}" for tokens, value in points]
        series.append(Series(run_name, colours[run_name], points, notes=notes))
    losses = {run.teacher_loss for run in runs.values()}
    end = max((tokens for one in series for tokens, _ in one.points), default=0.0)
    if name == "loss" and len(losses) == 1 and (loss := losses.pop()) is not None:
        series.insert(0, Series("teacher", "teacher", [(0, loss), (end, loss)], "dashed"))
    return _nats(title, note, series, zero=name == "kl")


def _by_stage(run: RunRecord, name: str) -> list[tuple[Stage, list[Point]]]:
    """Each stage's values of a held-out metric over the tokens of the whole run."""
    found, before = [], 0.0
    for stage in run.stages:
        points = [(before + tokens, values[name]) for tokens, values in stage.held_out if name in values]
        before += stage.tokens or 0
        end = getattr(stage.evaluation.metrics, name, None) if stage.evaluation else None
        if end is not None:
            points = [point for point in points if point[0] < before] + [(before, end)]
        found.append((stage, points))
    return found


def _over_run(run: RunRecord, name: str, title: str, note: str) -> Chart:
    """A held-out metric over the tokens of the whole run, one colour a stage."""
    series: list[Series] = []
    at_end: Point | None = None
    for stage, points in _by_stage(run, name):
        # A stage's line starts where the stage before it ended.
        if at_end is not None and points and points[0][0] > at_end[0]:
            points.insert(0, at_end)
        at_end = points[-1] if points else at_end
        notes = [f"{stage.name}, {words.amount(tokens)} tokens: {words.plain(value)}" for tokens, value in points]
        series.append(Series(stage.heading, colour(stage.name), points, notes=notes))
    values = [value for one in series for _, value in one.points]
    end = float(sum(stage.tokens or 0 for stage in run.stages))
    if name == "loss" and run.teacher_loss is not None and values:
        series.insert(0, Series("teacher", "teacher", [(0, run.teacher_loss), (end, run.teacher_loss)], "dashed"))
    return _nats(title, note, series, zero=name == "kl")


def _nats(title: str, note: str, series: Sequence[Series], *, zero: bool) -> Chart:
    log = spans_decades([value for one in series if one.look == "line" for _, value in one.points])
    y = Axis("nats per token" + ", log scale" * log, words.short, log=log, zero=zero)
    return line_chart(title, note, series, Axis("training tokens", words.short, zero=True), y)


def _layer_chart(run: RunRecord) -> Chart:
    series = []
    for stage in run.measured:
        assert stage.evaluation is not None
        points = list(enumerate(stage.evaluation.layer_distances))
        notes = [f"layer {layer}, {stage.heading}: {words.percent(value)}" for layer, value in points]
        series.append(Series(stage.heading, colour(stage.name), points, notes=notes))
    depth = max((len(one.points) for one in series), default=0)
    log = spans_decades([value for one in series for _, value in one.points])
    every = -(-depth // 8) or 1
    kept = [index for index, kind in enumerate(run.layers) if kind == "attention"]
    return line_chart(
        "Distance of each layer’s output",
        "To the teacher’s" + "; shaded layers keep attention" * bool(kept) + ".",
        series,
        Axis("layer", lambda value: f"{value:.0f}", ticks=range(0, depth, every)),
        Axis("relative L2 distance" + ", log scale" * log, words.short, log=log, zero=True),
        bands=[(index - 0.5, index + 0.5) for index in kept],
    )


def _training_chart(stage: Stage) -> Chart:
    raw: Sequence[Point] = thinned([point for point in stage.training if point[1] == point[1]])
    objective = MINIMISED.get(stage.name, "training loss")
    spent = f"{words.amount(stage.tokens)} tokens in {words.duration(stage.seconds)}" if stage.tokens else "so far"
    kept = f"; the weights of step {stage.kept_step:,} were kept as the best" if stage.kept_step is not None else ""
    log = spans_decades([value for _, value in raw])
    return line_chart(
        f"{stage.name.capitalize()} stage",
        f"{objective.capitalize()}, {spent}{kept}.",
        [
            Series("", colour(stage.name), raw, "faint"),
            Series("", colour(stage.name), smoothed(raw)),
        ],
        Axis("training tokens", words.short, zero=True),
        Axis("training loss" + ", log scale" * log, words.short, log=log),
    )
