"""The teacher's predictions on disk: written whole, shared among processes, believed only when intact, read back."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from distill.data import TrainingBatches
from distill.errors import UserError
from distill.objectives import logit_loss
from distill.objectives.topk import top_k_and_tail, topk_loss
from distill.teacher_cache import CachedBatches
from distill.teacher_cache.writer import missing_shards, require_space, write_shards
from tests.conftest import tiny
from tests.distill.teacher_cache.conftest import (
    N_BLOCKS,
    SEED,
    SHARD_BLOCKS,
    TOKENS,
    VOCABULARY,
    K,
    RandomBlocks,
    cache_in,
    contents,
    never,
)

SHARDS = -(-N_BLOCKS // SHARD_BLOCKS)


def teacher() -> torch.nn.Module:
    return tiny("llama")


def fill(cache, load=teacher, world=1) -> None:
    """What the processes of a run do together, one after another."""
    cache.claim()
    missing = sorted(shard for rank in range(world) for shard in missing_shards(cache, rank=rank, world=world))
    for rank in reversed(range(world)) if missing else ():
        settings = {"batch_size": 3, "device": torch.device("cpu"), "rank": rank, "world": world}
        write_shards(cache, missing, RandomBlocks(), load(), **settings)


@pytest.fixture
def whole(tmp_path) -> Path:
    cache = cache_in(tmp_path / "whole")
    fill(cache)
    return cache.folder


def test_every_block_is_there_once_in_the_order_of_training(cache):
    fill(cache)
    names = ["cache.json", *(f"shard-{n:05d}.topk" for n in range(SHARDS))]
    assert [path.name for path in sorted(cache.folder.iterdir())] == names
    order = TrainingBatches(RandomBlocks(), 1, SEED)
    read = [block for shard in cache.shards for block in cache.blocks_of(shard)]
    assert read == [order.indices(step)[0] for step in range(N_BLOCKS)]
    assert sorted(read) == list(range(N_BLOCKS))
    on_disk = sum(path.stat().st_size for path in cache.folder.glob("shard-*"))
    assert on_disk == cache.n_bytes == cache.tokens * (3 * K + 4) + SHARDS * 40


def test_what_is_read_is_what_the_teacher_said(cache, blocks):
    fill(cache)
    asked = [7, 0, 22, 7]
    batch = blocks.batch(asked)
    logits = teacher()(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    top = top_k_and_tail(logits, K)
    got = cache.read(asked)
    wanted = cache.codec.decode(cache.codec.encode(top))
    assert torch.equal(got.ids_BTK, wanted.ids_BTK)
    # Another batch size is another order of additions, which may tip a code.
    torch.testing.assert_close(got.log_probs_BTK, wanted.log_probs_BTK, rtol=0, atol=0.05)
    torch.testing.assert_close(got.log_tail_BT, wanted.log_tail_BT, rtol=2e-3, atol=0)


def test_batches_bring_the_predictions_of_their_blocks_in_every_epoch(cache, blocks):
    fill(cache)
    batches = TrainingBatches(blocks, 5, SEED)
    cached = CachedBatches(batches, cache)
    for step in (0, 4, 11):
        batch, plain, top = cached.batch(step), batches.batch(step), cache.read(batches.indices(step))
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
        assert torch.equal(batch["teacher_ids"], top.ids_BTK)
        assert torch.equal(batch["teacher_log_probs"], top.log_probs_BTK)
        assert torch.equal(batch["teacher_log_tail"], top.log_tail_BT)
        assert batch["teacher_ids"].shape == (5, TOKENS, K)
        assert batch["teacher_ids"].dtype == torch.int64


def test_with_the_whole_vocabulary_the_loss_is_that_of_the_teacher_itself(tmp_path, blocks):
    cache = cache_in(tmp_path, top_k=VOCABULARY)
    fill(cache)
    batch = CachedBatches(TrainingBatches(blocks, 4, SEED), cache).batch(0)
    arguments = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    student_BTV = tiny("llama", seed=1)(**arguments).logits
    full = logit_loss(student_BTV, teacher()(**arguments).logits, batch["labels"])
    top = batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_tail"]
    assert topk_loss(student_BTV, *top, batch["labels"]).item() == pytest.approx(full.item(), rel=2e-3)


def test_the_share_that_the_top_k_hold(cache, blocks):
    fill(cache)
    batch = blocks.batch(range(N_BLOCKS))
    logits = teacher()(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    held = logits.softmax(-1).topk(K).values.sum(-1).mean()
    assert cache.covered() == pytest.approx(held.item(), rel=1e-5)


@pytest.mark.parametrize("world", [2, 4, 9])
def test_several_processes_write_the_same_bytes_together(cache, whole, world):
    fill(cache, world=world)
    assert contents(cache.folder) == contents(whole)


@pytest.mark.parametrize("world", [2, 4, 9])
def test_a_teacher_in_pieces_is_called_equally_often_by_every_process(cache, world):
    """Or the processes that gather its weights would wait for each other for ever."""
    calls = []

    def counting() -> torch.nn.Module:
        model = teacher()
        calls.append(0)
        model.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        return model

    fill(cache, counting, world=world)
    rounds = [range(SHARDS)[first : first + world] for first in range(0, SHARDS, world)]
    passes = sum(-(-len(cache.blocks_of(turn[0])) // 3) for turn in rounds)
    assert calls == [passes] * world


def test_nothing_is_written_twice(cache):
    fill(cache)
    written = {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    fill(cache, never)
    assert {path: path.stat().st_mtime_ns for path in cache.folder.iterdir()} == written


def _write_slowly(folder: Path) -> None:
    model = teacher()
    model.register_forward_hook(lambda *_: time.sleep(0.03))
    fill(cache_in(folder), lambda: model)


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_same_to_the_byte(cache, whole):
    for shards in (1, 4):
        process = multiprocessing.get_context("spawn").Process(target=_write_slowly, args=(cache.folder,))
        process.start()
        given_up = time.monotonic() + 120
        while len(list(cache.folder.glob("shard-*"))) < shards:
            assert process.is_alive()
            assert time.monotonic() < given_up
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    there = contents(cache.folder)
    assert len(there) < len(contents(whole))
    # What a kill in the middle of writing leaves.
    (cache.folder / f".shard-{SHARDS - 1:05d}.topk.partial").write_bytes(b"half")
    fill(cache)
    assert contents(cache.folder) == contents(whole)
    assert there.items() <= contents(cache.folder).items()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def _of_another_teacher(path: Path) -> None:
    other = cache_in(path.parent.with_name("other"), teacher="o" * 64)
    fill(other, lambda: tiny("llama", seed=5))
    shutil.copy(other.folder / path.name, path)


DAMAGES = {
    "cut short": (lambda path: os.truncate(path, 1000), "has 1,000 bytes instead of 1,832"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes instead of 1,832"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"more"), "is not what was written"),
    "one bit": (_flip, "is not what was written (its SHA-256 differs)"),
    "renamed": (lambda path: shutil.copy(path.with_name("shard-00001.topk"), path), "is not what was written"),
    "another teacher's": (_of_another_teacher, "is not what was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_made_again(cache, whole, capfd, damage):
    fill(cache)
    harm, said = DAMAGES[damage]
    path = cache.folder / "shard-00002.topk"
    others = {other: other.stat().st_mtime_ns for other in cache.folder.iterdir() if other != path}
    harm(path)
    capfd.readouterr()
    assert said in cache.damage_of(2)
    fill(cache)
    assert f"{path} {said}" in capfd.readouterr().err
    assert contents(cache.folder) == contents(whole)
    assert {other: other.stat().st_mtime_ns for other in others} == others


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"teacher": "o" * 64}, f"teacher: {'t' * 64} → {'o' * 64}"),
        ({"teacher_dtype": "bfloat16"}, "teacher_dtype: float32 → bfloat16"),
        ({"text": "y" * 64}, "text: xxx"),
        ({"block": 32}, "block: 16 → 32"),
        ({"order": 4}, "order: 3 → 4"),
        ({"vocabulary": 98}, "vocabulary: 97 → 98"),
        ({"top_k": 16}, "top_k: 8 → 16"),
        ({"shard_blocks": 8, "format": 2}, "shard_blocks: 4 → 8; format: 1 → 2"),
    ],
)
def test_another_cache_is_refused_and_left_alone(cache, other, said):
    fill(cache)
    before = contents(cache.folder)
    with pytest.raises(UserError, match="choose another run_dir, or remove the folder") as refusal:
        fill(cache_in(cache.folder, **other), never)
    assert said in str(refusal.value)
    assert contents(cache.folder) == before


def test_a_manifest_that_cannot_be_read_is_refused(cache):
    fill(cache)
    (cache.folder / "cache.json").write_text("{")
    with pytest.raises(UserError, match="not this recipe's"):
        fill(cache, never)


def test_more_tokens_only_add_to_it_and_fewer_need_nothing(tmp_path, whole):
    folder = tmp_path / "logits"
    fill(cache_in(folder, n_blocks=10))
    kept = {name: content for name, content in contents(folder).items() if name < "shard-00002"}
    assert kept.items() <= contents(whole).items()
    fill(cache_in(folder))
    assert contents(folder) == contents(whole)
    fewer = cache_in(folder, n_blocks=10)
    fill(fewer, never)
    assert contents(folder) == contents(whole)
    assert torch.equal(fewer.read(fewer.blocks_of(2)).ids_BTK, cache_in(folder).read(fewer.blocks_of(2)).ids_BTK)


@pytest.mark.parametrize("harm", [os.unlink, lambda path: os.truncate(path, 100)], ids=["missing", "cut short"])
def test_a_shard_that_goes_while_training_reads_is_named(cache, harm):
    fill(cache)
    harm(cache.folder / "shard-00001.topk")
    cache.read(cache.blocks_of(0))
    with pytest.raises(UserError, match=r"shard-00001.topk is missing or was cut short; run the same command again"):
        cache.read(cache.blocks_of(1)[-1:])


def test_a_teacher_that_says_nan_is_refused(cache):
    broken = teacher()
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(UserError, match=r"the teacher's logits on blocks .* are not finite"):
        fill(cache, lambda: broken)
    assert not list(cache.folder.glob("*.topk"))


def test_a_disk_that_is_too_small_is_noticed_beforehand(cache, monkeypatch):
    fill(cache)
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    require_space(cache, [0, 5])
    with pytest.raises(UserError, match=r"take 5.37 KiB more and 4.88 KiB are free"):
        require_space(cache, [0, 1, 2])
