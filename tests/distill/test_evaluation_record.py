import json
import math

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.evaluation import Metrics
from distill.evaluation_record import (
    Evaluation,
    MatrixPair,
    Sample,
    read_evaluation,
    read_matrices,
    write_evaluation,
)

EVALUATION = Evaluation(
    metrics=Metrics(loss=1.5, perplexity=math.exp(1.5), tokens=640, teacher_loss=1.25, kl=0.3, agreement=0.75),
    layer_distances=(0.1, 0.25),
    samples=(Sample("Es war", " einmal “ein”\n", " <b>"), Sample("x", "y")),
)


def pair(layer: int, head: int, tokens: int = 100) -> MatrixPair:
    generator = torch.Generator().manual_seed(layer)
    teacher, student = (torch.rand(tokens, tokens, generator=generator).tril() for _ in range(2))
    return MatrixPair.of(layer, head, teacher, student)


def strict(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "metrics",
    [
        EVALUATION.metrics,
        Metrics(loss=2.0, perplexity=math.exp(2.0), tokens=3),
        Metrics(loss=800.0, perplexity=math.inf, tokens=3, teacher_loss=1.0, kl=-math.inf, agreement=0.0),
    ],
)
def test_what_is_written_is_read(tmp_path, metrics):
    evaluation = Evaluation(metrics, EVALUATION.layer_distances, EVALUATION.samples)
    write_evaluation(tmp_path / "stage", evaluation)
    assert read_evaluation(tmp_path / "stage") == evaluation
    strict((tmp_path / "stage/evaluation.json").read_text())


def test_nan_is_kept_apart_from_what_was_not_measured(tmp_path):
    write_evaluation(tmp_path, Evaluation(Metrics(math.nan, math.nan, 3, 1.0, math.nan), (math.nan, 0.5)))
    fields = strict((tmp_path / "evaluation.json").read_text())
    assert (fields["metrics"]["kl"], fields["metrics"]["agreement"]) == ("nan", None)
    read = read_evaluation(tmp_path)
    assert math.isnan(read.metrics.kl)
    assert read.metrics.agreement is None
    assert math.isnan(read.layer_distances[0])


def test_matrices_come_back_by_layer_and_head_cut_to_64_tokens(tmp_path):
    pairs = [pair(10, 0), pair(2, 3), pair(2, 1)]
    write_evaluation(tmp_path, EVALUATION, pairs)
    read = read_matrices(tmp_path)
    assert [(one.layer, one.head) for one in read] == [(2, 1), (2, 3), (10, 0)]
    assert read[2].teacher.shape == (64, 64)
    assert read[2].teacher.dtype == np.float16
    np.testing.assert_array_equal(read[2].student, pairs[0].student)
    assert (tmp_path / "matrices.npz").stat().st_size < 3 * 2 * 64 * 64 * 2 + 2000


def test_a_new_evaluation_replaces_all_of_the_old_one(tmp_path):
    write_evaluation(tmp_path, EVALUATION, [pair(0, 0)])
    write_evaluation(tmp_path, Evaluation(Metrics(1.0, math.e, 5)))
    assert read_matrices(tmp_path) == []
    assert read_evaluation(tmp_path).samples == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json"]


def test_nothing_there_is_not_an_error(tmp_path):
    assert read_evaluation(tmp_path) is None
    assert read_matrices(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"tokens"', '"token"'),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace("0.75", '"much"'),
        lambda text: text.replace('"prompt"', '"question"'),
    ],
)
def test_a_damaged_evaluation_is_named(tmp_path, damage):
    write_evaluation(tmp_path, EVALUATION)
    path = tmp_path / "evaluation.json"
    text = damage(path.read_text())
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(UserError, match=r"evaluation\.json: is no evaluation .*evaluate this stage again"):
        read_evaluation(tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 700])
def test_damaged_matrices_are_named(tmp_path, keep):
    write_evaluation(tmp_path, EVALUATION, [pair(0, 0)])
    path = tmp_path / "matrices.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"matrices\.npz: holds no mixing matrices"):
        read_matrices(tmp_path)


def test_likeness_of_matrices():
    teacher = torch.eye(3)
    assert MatrixPair.of(0, 0, teacher, 5 * teacher).cosine() == pytest.approx(1)
    assert MatrixPair.of(0, 0, teacher, 5 * teacher).size_ratio() == pytest.approx(5)
    assert MatrixPair.of(0, 0, teacher, -teacher).cosine() == pytest.approx(-1)
    assert MatrixPair.of(0, 0, teacher, teacher.roll(1, 0)).cosine() == 0
    assert math.isnan(MatrixPair.of(0, 0, teacher, 0 * teacher).cosine())
    assert MatrixPair.of(0, 0, teacher, 0 * teacher).size_ratio() == 0
    assert math.isnan(MatrixPair.of(0, 0, teacher, math.inf * torch.ones(3, 3)).size_ratio())
    assert math.isnan(MatrixPair.of(0, 0, 0 * teacher, teacher).size_ratio())
