"""Image-text rows: what may stand in them, what a family's processor makes of them, and the order they come in."""

import json

import pytest
import torch

from distill.data import TrainingBatches
from distill.data.image_encoding import ImageEncoder
from distill.data.image_rows import find_row_files, read_image_rows
from distill.data.image_text import ImageTextRows, prepare_image_text, read_image_manifest
from distill.errors import UserError
from tests.vision_processors import PROCESSORS, draw, tiny_processor

CHATS = sorted(set(PROCESSORS) - {"paligemma"})


def written(folder, rows) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str, *images: str, again: str = "") -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if again:
        messages += [{"role": "user", "content": "why?"}, {"role": "assistant", "content": again}]
    return {"messages": messages, "images": list(images)}


def encoded(folder, family, rows):
    processor, image = tiny_processor(family)
    read = list(read_image_rows(find_row_files([written(folder, rows)])))
    encoder = ImageEncoder(processor, read[0].kind, image)
    return encoder, [encoder.encode(row) for row in read]


def spelled(encoder, ids) -> str:
    return encoder.processor.tokenizer.decode(ids)


@pytest.mark.parametrize("family", CHATS)
def test_answers_are_scored_and_nothing_else(family, tmp_path):
    tiny_processor(family)
    one, two = draw(tmp_path / "1.png", seed=1), draw(tmp_path / "2.png", (16, 20), seed=2)
    rows = [
        chat("<image>what is it?", "a cat.", one, again="so it is."),
        chat("compare <image> and <image>!", "one is a dog.", one, two),
        chat("no image here", "none."),
    ]
    encoder, made = encoded(tmp_path, family, rows)
    batch = encoder.batch(made, "answers")
    texts = [spelled(encoder, row[row != -100]) for row in batch["labels"]]
    assert texts == ["a cat.</s>so it is.</s>", "one is a dog.</s>", "none.</s>"]
    assert torch.equal(batch["valid"].sum(1), torch.tensor([row.n_tokens for row in made]))
    assert [(row == encoder.image_token_id).sum() for row in batch["input_ids"]] == [4, 8, 0]
    assert torch.equal(batch["labels"][batch["labels"] != -100], batch["input_ids"][batch["labels"] != -100])
    assert not (set(batch) & {"attention_mask"})


def test_all_of_a_text_is_scored_but_its_images_unless_they_are_asked_for(tmp_path):
    tiny_processor("llava")
    encoder, made = encoded(tmp_path, "llava", [{"text": "a <image> b", "images": [draw(tmp_path / "1.png")]}])
    text, everything = (encoder.batch(made, score)["labels"][0] for score in ("text", "all"))
    ids = encoder.batch(made, "text")["input_ids"][0]
    is_image = ids == encoder.image_token_id
    assert torch.equal(text[1:] == -100, is_image[1:])
    assert (everything[1:] == ids[1:]).all()
    assert text[0] == everything[0] == -100


def test_a_prompts_answer_is_found_with_and_without_a_processor_that_takes_it_apart(tmp_path):
    image = draw(tmp_path / "1.png") if tiny_processor("llava") else ""
    rows = [{"prompt": "<image>caption", "answer": "a cat", "images": [image]}]
    for family in ("llava", "paligemma"):
        encoder, made = encoded(tmp_path, family, rows)
        batch = encoder.batch(made, "answers")
        labels = batch["labels"][0]
        assert spelled(encoder, labels[labels != -100]) == "a cat</s>"
    assert torch.equal(batch["token_type_ids"][0].bool(), labels != -100)  # PaliGemma reads the rest both ways


def test_paligemma_is_given_prompts_and_answers(tmp_path):
    tiny_processor("paligemma")
    with pytest.raises(UserError, match=r"rows.jsonl:1: has text; PaliGemmaProcessor reads all but answers"):
        encoded(tmp_path, "paligemma", [{"text": "<image>x", "images": [draw(tmp_path / "1.png")]}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "no message of the assistant"),
        (chat("<image>?", "x"), "1 <image> marks or image parts and 0 images"),
        (chat("<image>?", "x", "gone.png"), "no image .*gone.png"),
        ({"images": []}, "needs one of messages, prompt"),
        ({"prompt": "x", "images": []}, "a prompt needs an answer"),
        ({"messages": [{"role": "user"}]}, "a message needs role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of a message is text or image"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_file_and_line(row, message, tmp_path):
    tiny_processor("llava")
    good = chat("hi", "ho")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {message}"):
        encoded(tmp_path, "llava", [good, row])


def test_an_image_without_a_mark_stands_first_and_parts_are_read_too(tmp_path):
    tiny_processor("llava")
    image = draw(tmp_path / "1.png")
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    as_parts = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    rows = [chat("what?", "x", image), as_parts | {"images": [image]}, chat("<image>what?", "x", image)]
    _, made = encoded(tmp_path, "llava", rows)
    assert len({row.text for row in made}) == 1


def test_rows_are_prepared_once_and_served_in_a_seeded_order(tmp_path):
    processor, image = tiny_processor("llava")
    rows = [chat("<image>" + "x" * (i % 5), f"it is {i}.", draw(tmp_path / f"{i}.png", seed=i)) for i in range(12)]
    rows.append(chat("y" * 200, "too long"))
    source, folder = written(tmp_path, rows), tmp_path / "data"
    first = prepare_image_text([source], processor, image, folder, block=60, fraction=0.3)
    assert first.rows["train"] + first.rows["held_out"] == 12
    assert first.too_long == 1
    before = (folder / "train.rows").stat().st_mtime_ns
    assert prepare_image_text([source], processor, image, folder, block=60, fraction=0.3) == first
    assert (folder / "train.rows").stat().st_mtime_ns == before
    train = ImageTextRows(folder, "train", 60, processor, image, "answers")
    batches = [TrainingBatches(train, 2, seed=5).batch(step) for step in (3, 0, 3)]
    assert torch.equal(batches[0]["input_ids"], batches[2]["input_ids"])
    assert torch.equal(batches[0]["pixel_values"], batches[2]["pixel_values"])
    assert not torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    seen = {train.row(i).images for i in TrainingBatches(train, len(train), seed=5).indices(0)}
    assert len(seen) == len(train)


def test_another_image_is_another_fingerprint_and_another_size_is_noticed(tmp_path):
    processor, image = tiny_processor("llava")
    rows = [chat("<image>?", f"it is {i}.", draw(tmp_path / f"{i}.png", seed=i)) for i in range(8)]
    source = written(tmp_path, rows)
    first = prepare_image_text([source], processor, image, tmp_path / "data", block=60, fraction=0.3)
    draw(tmp_path / "3.png", seed=77)
    again = prepare_image_text([source], processor, image, tmp_path / "again", block=60, fraction=0.3)
    assert first.fingerprint != again.fingerprint
    (tmp_path / "3.png").write_bytes(b"no image")
    rows = ImageTextRows(tmp_path / "data", "train", 60, processor, image, "answers")
    if any("3.png" in rows.row(i).images[0] for i in range(len(rows))):
        with pytest.raises(UserError, match=r"3\.png: cannot be read as an image"):
            rows.batch(range(len(rows)))
    assert read_image_manifest(tmp_path) is None
