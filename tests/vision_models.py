"""Tiny random vision-language models of the real classes, and batches as their processors would make them.

Pixels are synthesised, so nothing here needs Pillow. Every row holds one image between text tokens, of four features
(one more row has two images), and is padded where its text is shorter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE, FEATURES = 5, 4  # the placeholder's id; what an image of 8 x 8 pixels becomes
TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {**TEXT, "head_dim": 8}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def _qwen2_vl() -> PreTrainedModel:
    tower = {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": dict(MROPE)}, vision_config=tower)
    return Qwen2VLForConditionalGeneration(_with_ids(config))


def _qwen2_5_vl() -> PreTrainedModel:
    tower = {**QWEN_TOWER, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16}
    tower["fullatt_block_indexes"] = [1]
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": dict(MROPE)}, vision_config=tower)
    return Qwen2_5_VLForConditionalGeneration(_with_ids(config))


def _with_ids(config: Any) -> Any:
    config.image_token_id, config.video_token_id = IMAGE, 6
    config.vision_start_token_id, config.vision_end_token_id = 7, 8
    return config


def _llava(text: Any) -> PreTrainedModel:
    tower = CLIPVisionConfig(**TOWER, patch_size=4, projection_dim=16)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE, image_seq_length=FEATURES)
    return LlavaForConditionalGeneration(config)


def _idefics(config_class: Any, model_class: Any) -> PreTrainedModel:
    tower = {**TOWER, "patch_size": 2}
    text = LlamaConfig(**TEXT)
    return model_class(config_class(text_config=text, vision_config=tower, image_token_id=IMAGE, scale_factor=2))


def _paligemma(text: Any) -> PreTrainedModel:
    tower = SiglipVisionConfig(**TOWER, patch_size=4, vision_use_head=False)
    config = PaliGemmaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    return PaliGemmaForConditionalGeneration(config)


def _gemma3() -> PreTrainedModel:
    text = Gemma3TextConfig(**GEMMA, sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    tower = SiglipVisionConfig(**TOWER, patch_size=2, vision_use_head=False)
    config = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=FEATURES, image_token_index=IMAGE)
    return Gemma3ForConditionalGeneration(config)


@dataclass(frozen=True)
class Vision:
    """A model and what its processor adds to a batch.

    Attributes:
        pixels: the images of all rows, given how many each row has.
        types: what it calls the token types: 1 where an image is (``mm``), or in what is answered (``suffix``).
    """

    make: Callable[[], PreTrainedModel]
    pixels: Callable[[list[int]], dict[str, Tensor]]
    types: str = ""


def _stacked(counts: list[int]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(sum(counts), 3, 8, 8)}


def _patches(counts: list[int]) -> dict[str, Tensor]:
    n = sum(counts)
    return {"pixel_values": torch.randn(16 * n, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}


def _by_row(counts: list[int]) -> dict[str, Tensor]:
    pixels = torch.randn(len(counts), max(counts), 3, 8, 8)
    for row, count in enumerate(counts):
        pixels[row, count:] = 0
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(len(counts), max(counts), 8, 8).long()}


MODELS: dict[str, Vision] = {
    "llava": Vision(lambda: _llava(LlamaConfig(**TEXT)), _stacked),
    "llava-mistral": Vision(lambda: _llava(MistralConfig(**TEXT, head_dim=12, sliding_window=None)), _stacked),
    "qwen2_vl": Vision(_qwen2_vl, _patches, "mm_token_type_ids"),
    "qwen2_5_vl": Vision(_qwen2_5_vl, _patches, "mm_token_type_ids"),
    "idefics3": Vision(lambda: _idefics(Idefics3Config, Idefics3ForConditionalGeneration), _by_row),
    "smolvlm": Vision(lambda: _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration), _by_row),
    "paligemma": Vision(lambda: _paligemma(GemmaConfig(**GEMMA)), _stacked, "suffix"),
    "paligemma2": Vision(lambda: _paligemma(Gemma2Config(**GEMMA, sliding_window=16)), _stacked, "suffix"),
    "gemma3": Vision(_gemma3, _stacked, "token_type_ids"),
}
CAUSAL = sorted(set(MODELS) - {"paligemma", "paligemma2", "gemma3"})


def tiny_vision(name: str, seed: int = 0) -> PreTrainedModel:
    """A random teacher whose every parameter is away from its initial value, biases and norms included."""
    torch.manual_seed(seed)
    model = MODELS[name].make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


def image_batch(name: str, lengths: tuple[int, ...] = (17, 12, 17), *, left: bool = False, seed: int = 3) -> dict:
    """Rows of the given lengths, padded: two tokens, an image, text; where there is room a second image."""
    torch.manual_seed(seed)
    width, vision = max(lengths), MODELS[name]
    ids_BT = torch.zeros(len(lengths), width, dtype=torch.long)
    mask_BT, suffix_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    counts = [2 if row == 0 and length > 14 else 1 for row, length in enumerate(lengths)]
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tokens = torch.randint(10, 97, (length,))
        for image in range(count):
            start = 2 + image * (FEATURES + 2)
            tokens[start : start + FEATURES] = IMAGE
        place = slice(width - length, width) if left else slice(0, length)
        ids_BT[row, place], mask_BT[row, place] = tokens, 1
        suffix_BT[row, place] = (torch.arange(length) >= length - 3).long()
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, **vision.pixels(counts)}
    if vision.types == "suffix":
        batch["token_type_ids"] = suffix_BT
    elif vision.types:
        batch[vision.types] = (ids_BT == IMAGE).long()
    return batch


def row_of(name: str, batch: dict[str, Tensor], row: int, columns: slice) -> dict[str, Tensor]:
    """One row of an ``image_batch`` whose first row has two images, without its padding."""
    shape = batch["input_ids"].shape
    alone = {key: value[row : row + 1, columns] for key, value in batch.items() if value.shape[:2] == shape}
    first, n_images = (0, 2) if row == 0 else (row + 1, 1)
    images = slice(row, row + 1) if name in ("idefics3", "smolvlm") else slice(first, first + n_images)
    for key in ("image_grid_thw", "pixel_attention_mask"):
        if key in batch:
            alone[key] = batch[key][images]
    patches = slice(16 * first, 16 * (first + n_images))
    alone["pixel_values"] = batch["pixel_values"][patches if "image_grid_thw" in batch else images]
    return alone
