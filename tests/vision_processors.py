"""Tiny processors of the real families, over one tokenizer whose ids fit the tiny models' vocabulary, and recipes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from tests.vision_models import tiny_vision

SPECIALS = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<|image_pad|>"]
SPECIALS += ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<start_of_image>", "<end_of_image>"]
SPECIALS += ["<image_soft_token>", "<end_of_utterance>", "<row_1_col_1>"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz.,:?!0123456789'-", "Ġ", "Ċ"]  # the last two are blank and newline
VOCABULARY = len(SPECIALS) + len(LETTERS)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}MARK{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(**named: Any) -> PreTrainedTokenizerFast:
    """A token a letter."""
    vocab = {token: index for index, token in enumerate([*SPECIALS, *LETTERS])}
    made = Tokenizer(BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **named)


def _llava() -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE.replace("MARK", "<image>"),
    )


def _qwen(name: str) -> Any:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if not is_torchvision_available():
        pytest.skip("Qwen-VL's processor needs torchvision for its videos")
    return getattr(transformers, name)(
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256),
        tokenizer(),
        transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=TEMPLATE.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _idefics3() -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 8}, max_image_size={"longest_edge": 8}, do_image_splitting=False
    )
    return Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=TEMPLATE.replace("MARK", "<image>"))


def _smolvlm() -> Any:
    pytest.importorskip("num2words")
    if not is_torchvision_available():
        pytest.skip("SmolVLM's processor needs torchvision for its videos")
    from transformers import SmolVLMProcessor, SmolVLMVideoProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 8}, max_image_size={"longest_edge": 8}, do_image_splitting=False
    )
    template = TEMPLATE.replace("MARK", "<image>")
    return SmolVLMProcessor(images, tokenizer(), SmolVLMVideoProcessor(), image_seq_len=4, chat_template=template)


def _paligemma() -> Any:
    from transformers import PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, tokenizer())


def _gemma3() -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 8, "width": 8}, do_pan_and_scan=False),
        tokenizer(extra_special_tokens=names),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("MARK", "<start_of_image>"),
    )


PROCESSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (_llava, "<image>"),
    "qwen2_vl": (lambda: _qwen("Qwen2VLProcessor"), "<|image_pad|>"),
    "qwen2_5_vl": (lambda: _qwen("Qwen2_5_VLProcessor"), "<|image_pad|>"),
    "idefics3": (_idefics3, "<image>"),
    "smolvlm": (_smolvlm, "<image>"),
    "paligemma": (_paligemma, "<image>"),
    "gemma3": (_gemma3, "<image_soft_token>"),
}


def tiny_processor(family: str) -> tuple[Any, int]:
    """A family's processor and the id of its placeholder; skips with the reason where a package is missing."""
    pytest.importorskip("PIL", reason="Pillow makes and reads the images")
    make, placeholder = PROCESSORS[family]
    return make(), SPECIALS.index(placeholder)


def draw(path: Path, size: tuple[int, int] = (20, 16), seed: int = 0) -> str:
    """A small PNG of one colour with a bar in it; its name."""
    from PIL import Image

    image = Image.new("RGB", size, ((37 * seed) % 256, (91 * seed + 60) % 256, 120))
    image.paste((255, 255, 255), (seed % size[0], 0, seed % size[0] + 2, size[1]))
    image.save(path)
    return path.name


RECIPE = """\
name: tiny
run_dir: {folder}/run
teacher: {{path: {folder}/teacher}}
student: {{keep_attention: [1]}}
data:
  source: {folder}/rows.jsonl
  block: 64
  held_out: {{fraction: 0.2}}
  images: {{score: answers}}
stages:
  mixing: {{tokens: 2560, batch_size: 4}}
  hidden: {{tokens: 2560, batch_size: 4, lr: 1e-2}}
  logits: {{tokens: 2560, batch_size: 4, micro_batch_size: 2, train: [mixer, norms, mlp, connector]}}
evaluation: {{tokens: 512, prompts: ["hello"], new_tokens: 8}}
"""


def write_run(folder: Path, family: str = "llava", rows: int = 40) -> Path:
    """A teacher with its processor, rows about small images (every fourth without one) and a recipe; its path."""
    processor, image = tiny_processor(family)
    teacher = tiny_vision(family)
    teacher.config.image_token_id = image
    teacher.save_pretrained(folder / "teacher")
    processor.save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    lines = []
    for number in range(rows):
        name = f"images/{number}.png"
        draw(folder / name, seed=number)
        asked = "<image>what is it?" if number % 4 else "hello"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"bar number {number}."}]
        lines.append(json.dumps({"messages": messages, "images": [name] if number % 4 else []}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe
