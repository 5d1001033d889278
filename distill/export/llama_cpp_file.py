"""A student as a GGUF file that llama.cpp runs, written tensor by tensor with the ``gguf`` package.

llama.cpp's ``granitehybrid`` is the architecture: Mamba-2 or attention in each layer, then a gated MLP. Its graph asks
for mixers twice as wide as the model (``GGML_ASSERT(2 * n_embd == d_inner)``), which heads of zeros make so, exactly;
it rotates positions only where ``rope.scaling.finetuned`` says so, and takes llama3's scaling from a tensor of factors.
Matrices are stored in the type asked for, everything else in fp32.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from distill.errors import UserError
from distill.export.changes import MixerSize, Sizes
from distill.export.facts import StudentFacts
from distill.export.formats import Options
from distill.export.limits import GGUF
from distill.export.refusals import check_exportable
from distill.export.rotation import frequency_factors
from distill.export.stored import has_tokenizer, open_weights, read_student_config
from distill.export.vocabulary import Vocabulary, vocabulary
from distill.export.weights import translate

if TYPE_CHECKING:
    import gguf

OUTTYPES = ("f32", "f16", "q8_0")
_ARCHITECTURE = "granitehybrid"
_BLOCK = 32
"""Numbers that share a scale in q8_0; rows that do not divide into blocks stay f16."""


def write_gguf(student: Path, out: Path, options: Options) -> list[str]:
    """Write ``model-OUTTYPE.gguf``; see ``distill.export.formats.Format``."""
    if options.outtype not in OUTTYPES:
        raise UserError(f"--outtype is {options.outtype!r}; allowed are {', '.join(OUTTYPES)}")
    package = _package()
    facts = check_exportable(read_student_config(student), GGUF.name)
    if not has_tokenizer(student):
        raise UserError(f"{student} has no tokenizer, which a GGUF file must hold; save the teacher's beside it")
    words = vocabulary(AutoTokenizer.from_pretrained(student), facts.config.vocab_size)
    sizes = Sizes(facts.q_heads, facts.kv_heads, facts.mixer_size, _padded(facts, options.state))
    file = out / f"model-{options.outtype}.gguf"
    writer = package.GGUFWriter(file, _ARCHITECTURE)
    _say_architecture(writer, package, facts, sizes, options.outtype, student.resolve().name)
    _say_vocabulary(writer, words)
    with open_weights(student, facts.shapes) as stored:
        _write_tensors(writer, package, facts, sizes, stored, options.outtype)
    writer.close()
    added = sizes.padded.heads - facts.mixer_size.heads
    wider = f". {added} heads of zeros make each mixer {sizes.padded.inner} wide" if added else ""
    return [f"{file.name}: run it with llama.cpp or what is built on it{wider}"]


def _padded(facts: StudentFacts, state: int | None) -> MixerSize:
    """The mixers with heads and numbers of state of zeros.

    Raises:
        UserError: fewer numbers of state than there are.
    """
    padded = GGUF.padded(facts)
    assert padded is not None, "refusals let through what cannot be padded"
    if state is None:
        return padded
    if state < padded.state:
        raise UserError(f"--state is {state}; the mixers have {padded.state} numbers of state, which cannot be cut off")
    return replace(padded, state=state)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("--to gguf needs the package gguf: pip install 'distill-ssm[gguf]'") from None
    return gguf


def _say_architecture(
    writer: "gguf.GGUFWriter", package: Any, facts: StudentFacts, sizes: Sizes, outtype: str, name: str
) -> None:
    config: Any = facts.config
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_name(name)
    writer.add_type("model")
    writer.add_file_type(package.LlamaFileType[kinds[outtype]])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_block_count(len(facts.kinds))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    if facts.experts:
        writer.add_expert_count(facts.experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # A layer whose number of key/value heads is 0 is a mixer.
    writer.add_head_count(facts.q_heads)
    writer.add_head_count_kv([facts.kv_heads if index in facts.kept else 0 for index in range(len(facts.kinds))])
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_attention_scale(facts.scaling)
    writer.add_embedding_scale(facts.scales.embedding)
    writer.add_residual_scale(facts.scales.residual)
    writer.add_logit_scale(facts.scales.logits)
    writer.add_ssm_conv_kernel(facts.mixer["conv_width"])
    writer.add_ssm_inner_size(sizes.padded.inner)
    writer.add_ssm_state_size(sizes.padded.state)
    writer.add_ssm_time_step_rank(sizes.padded.heads)
    writer.add_ssm_group_count(sizes.padded.heads)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(facts.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_finetuned(any(facts.rotary.values()))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _say_vocabulary(writer: "gguf.GGUFWriter", words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.cut)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.model == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.add_space)
    else:
        writer.add_token_merges(words.merges)
    for role, number in words.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _write_tensors(
    writer: "gguf.GGUFWriter",
    package: Any,
    facts: StudentFacts,
    sizes: Sizes,
    stored: Mapping[str, Callable[[], Tensor]],
    outtype: str,
) -> None:
    """First the names and shapes of all, then the numbers of each; nothing is kept."""
    import numpy as np

    lengths = partial(_length, facts)
    rules, n_layers = GGUF.rules(facts), len(facts.kinds)
    factors = frequency_factors(facts.config)
    shapes = {name: partial(torch.empty, facts.shapes[name], device="meta") for name in stored}
    kinds: dict[str, Any] = {}
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), 4 * factors.numel())
    for name, tensor in translate(rules, n_layers, shapes, sizes, lengths):
        kinds[name] = kind = package.GGMLQuantizationType[_stored_as(name, tensor, outtype)]
        in_bytes = package.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        shape, dtype = (in_bytes, np.uint8) if kind.name == "Q8_0" else (tuple(tensor.shape), np.float32)
        writer.add_tensor_info(name, shape, np.dtype(dtype), int(np.prod(in_bytes)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for name, tensor in translate(rules, n_layers, stored, sizes, lengths):
        writer.write_tensor_data(package.quants.quantize(tensor.float().contiguous().numpy(), kinds[name]))


def _stored_as(name: str, tensor: Tensor, outtype: str) -> str:
    """What llama.cpp multiplies with as a matrix may be small; taps, rates, norms and routers are read as fp32."""
    small = ("ssm_conv1d.weight", "ssm_a", "ssm_d", "norm.weight", "ffn_gate_inp.weight")
    if outtype == "f32" or tensor.ndim < 2 or name.endswith(small):
        return "F32"
    return "Q8_0" if outtype == "q8_0" and tensor.shape[-1] % _BLOCK == 0 else "F16"


def _length(facts: StudentFacts, name: str, _axis: int) -> int:
    """Rows of the parts of Phi-3's fused matrices, and of Mixtral's for an expert."""
    kind = name.split(".")[-2]
    heads = {"attn_q": facts.q_heads, "attn_k": facts.kv_heads, "attn_v": facts.kv_heads}
    return heads[kind] * facts.head_dim if kind in heads else facts.config.intermediate_size
