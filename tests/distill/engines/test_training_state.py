"""What training changes, there and back: bit for bit, on one process or several, in shards or whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distill.engines import processes, training_state
from distill.engines.ddp import DdpEngine
from distill.engines.fsdp2 import Fsdp2Engine
from distill.engines.plain import PlainEngine
from distill.errors import UserError
from distill.objective import Part
from tests.distill.engines.several import several


class Student(nn.Module):
    """Shapes that two or four processes cannot share evenly, weights that are frozen, buffers of both kinds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(3, 5).requires_grad_(False)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.single = nn.Parameter(torch.randn(1, 5))
        self.register_buffer("steps", torch.tensor(100 * seed))
        self.register_buffer("frequencies", torch.full((2,), float(seed)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) * self.single
        for layer in self.layers:
            h = h + layer(h).tanh()
        return h


TRAINED = {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "single"}


def make_engine(kind: str, student: nn.Module) -> PlainEngine:
    groups: list[dict[str, Any]] = [{"params": [p for p in student.parameters() if p.requires_grad], "lr": 0.1}]
    if kind == "ddp":
        return DdpEngine(student, groups, layerwise=False, device=torch.device("cpu"))
    if kind == "fsdp2":
        for module in (*student.layers, student):
            fully_shard(module)
        # Sharding made new parameters.
        groups[0]["params"] = [p for p in student.parameters() if p.requires_grad]
        return Fsdp2Engine(student, groups, layerwise=False)
    return PlainEngine(student, groups)


def train(engine: PlainEngine, first: int, steps: int) -> None:
    """Every process takes the same data, so that their mean is what one process would have, to the last bit."""
    student = engine.student
    for step in range(first, first + steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        engine.backward(
            lambda x=x: iter([Part("all", lambda: student.forward(x).square().sum())]),
            1 / engine.data_ranks,
            last=True,
        )
        engine.step(None)
        student.steps += 1


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_of(engine: PlainEngine) -> dict[str, Tensor]:
    """Everything by name, whole: weights, persistent buffers, and AdamW's states."""
    found = {name: whole(tensor) for name, tensor in engine.student.state_dict().items()}
    for name, parameter in engine.student.named_parameters():
        found |= {f"{name} {key}": whole(value) for key, value in engine.optimizer.state.get(parameter, {}).items()}
    return found


def require_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.fixture
def trained() -> PlainEngine:
    engine = make_engine("one", Student())
    train(engine, 0, 3)
    return engine


def test_what_was_saved_comes_back_bit_for_bit(tmp_path, trained):
    trained.save(tmp_path)
    other = make_engine("one", Student(seed=7))
    other.student.embed.load_state_dict(trained.student.embed.state_dict())
    other.load(tmp_path)
    require_same(state_of(other), state_of(trained))
    assert len([name for name in state_of(other) if name.endswith("exp_avg")]) == len(TRAINED)
    train(trained, 3, 2)
    train(other, 3, 2)
    require_same(state_of(other), state_of(trained))


def test_a_state_with_a_history_is_replaced(tmp_path, trained):
    trained.save(tmp_path)
    expected = state_of(trained)
    train(trained, 3, 2)
    assert not torch.equal(state_of(trained)["single exp_avg"], expected["single exp_avg"])
    trained.load(tmp_path)
    require_same(state_of(trained), expected)


def test_a_history_that_began_later_is_dropped(tmp_path):
    """Of a layer that trains only later, going back to an earlier step must forget what came since."""
    engine = make_engine("one", Student())
    engine.save(tmp_path)
    expected = state_of(engine)
    train(engine, 0, 2)
    engine.load(tmp_path)
    require_same(state_of(engine), expected)
    train(engine, 0, 2)
    fresh = make_engine("one", Student())
    train(fresh, 0, 2)
    require_same(state_of(engine), state_of(fresh))


def test_before_the_first_step_there_is_no_history(tmp_path):
    fresh = make_engine("one", Student())
    fresh.save(tmp_path)
    other = make_engine("one", Student())
    other.load(tmp_path)
    train(fresh, 0, 2)
    train(other, 0, 2)
    require_same(state_of(other), state_of(fresh))


def test_only_what_training_changes_is_saved(tmp_path, trained):
    trained.save(tmp_path)
    weights = training_state.read_weights(tmp_path)
    assert weights.keys() == TRAINED | {"steps"}
    for name in TRAINED:
        assert torch.equal(weights[name], trained.student.get_parameter(name))
    assert weights["steps"] == 3
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    trained.student.embed = nn.Linear(100, 100_000).requires_grad_(False)
    trained.save(tmp_path / "again")
    assert sum(path.stat().st_size for path in (tmp_path / "again").iterdir()) < size + 1000


def test_frozen_weights_are_left_out_and_buffers_kept(tmp_path):
    def student() -> nn.Sequential:
        made = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        made[0].weight.requires_grad_(False)
        return made

    def engine(of: nn.Module) -> PlainEngine:
        return PlainEngine(of, [{"params": [p for p in of.parameters() if p.requires_grad]}])

    one, other = student(), student()
    one(torch.randn(5, 2))
    engine(one).save(tmp_path)
    weights = training_state.read_weights(tmp_path)
    assert "0.weight" not in weights
    assert {"0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"} <= set(weights)
    before = other[0].weight.clone()
    engine(other).load(tmp_path)
    assert torch.equal(other[0].bias, one[0].bias)
    assert torch.equal(other[1].running_mean, one[1].running_mean)
    assert other[1].num_batches_tracked == 1
    assert torch.equal(other[0].weight, before)


def test_tied_weights_are_saved_once(tmp_path):
    def tied() -> PlainEngine:
        student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        student[1].weight = student[0].weight
        return PlainEngine(student, [{"params": list(student.parameters())}])

    one, other = tied(), tied()
    one.save(tmp_path)
    other.load(tmp_path)
    assert training_state.read_weights(tmp_path).keys() == {"0.weight", "0.bias", "1.bias"}
    assert other.student[1].weight is other.student[0].weight
    assert torch.equal(other.student[1].weight, one.student[1].weight)


def test_a_weight_that_never_had_a_gradient_is_no_obstacle(tmp_path):
    """Stage 1 never reaches a mixer's output projection, though it is among what trains."""

    def one_step(engine: PlainEngine) -> None:
        (engine.student[0](torch.ones(1, 3)).square().sum()).backward()
        engine.step(None)

    def engine() -> PlainEngine:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        return PlainEngine(student, [{"params": list(student.parameters()), "lr": 0.1, "weight_decay": 0.5}])

    one, other = engine(), engine()
    one_step(one)
    one.save(tmp_path)
    other.load(tmp_path)
    require_same(state_of(other), state_of(one))
    one_step(one)
    one_step(other)
    require_same(state_of(other), state_of(one))


def test_another_student_is_refused_by_name(tmp_path, trained):
    trained.save(tmp_path)
    larger = Student()
    larger.layers.append(nn.Linear(5, 5))
    with pytest.raises(UserError, match=r"lacks .*layers\.2\..* of what this run trains"):
        make_engine("one", larger).load(tmp_path)
    thawed = Student().requires_grad_(True)
    with pytest.raises(UserError, match=r"lacks .*embed\."):
        make_engine("one", thawed).load(tmp_path)


def test_what_deepspeed_wrote_is_refused(tmp_path, trained):
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/mp_rank_00_model_states.pt").touch()
    before = state_of(trained)
    with pytest.raises(UserError, match="written by DeepSpeed"):
        trained.load(tmp_path)
    require_same(state_of(trained), before)


def trained_and_saved(kind: str, folder: Path) -> dict[str, Tensor]:
    engine = make_engine(kind, Student())
    train(engine, 0, 3)
    engine.save(folder)
    processes.wait()
    return state_of(engine)


def loaded_and_trained(kind: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    student = Student(seed=7)
    student.embed.load_state_dict(Student().embed.state_dict())
    engine = make_engine(kind, student)
    engine.load(folder)
    loaded = state_of(engine)
    train(engine, 3, 2)
    return loaded, state_of(engine)


def on(layout: tuple[str, int], program: Any, folder: Path) -> list[Any]:
    """The results of all processes; "one" is this one."""
    kind, count = layout
    return [program(kind, folder)] if kind == "one" else several(count, program, kind, folder)


ONE, DDP, FSDP2 = ("one", 1), ("ddp", 2), ("fsdp2", 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [(FSDP2, FSDP2), (FSDP2, ONE), (DDP, FSDP2), (FSDP2, DDP), (ONE, FSDP2), (DDP, ONE), (("fsdp2", 4), FSDP2)],
    ids=lambda layout: "-".join(map(str, layout)),
)
def test_a_run_goes_on_with_other_processes_and_engines(tmp_path, trained, before, after):
    saved = on(before, trained_and_saved, tmp_path)
    expected = state_of(trained)
    for state in saved:
        require_same(state, expected)
    weights = training_state.read_weights(tmp_path)
    require_same(weights, {name: expected[name] for name in TRAINED | {"steps"}})

    train(trained, 3, 2)
    for loaded, gone_on in on(after, loaded_and_trained, tmp_path):
        require_same(loaded, expected)
        require_same(gone_on, state_of(trained))


def test_every_process_writes_its_own_shards(tmp_path):
    several(2, trained_and_saved, "fsdp2", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
