"""How each format names a student's tensors: one table a format, on top of what all have in common."""

from distill.export.changes import (
    BY_HEAD,
    CHANNELS,
    COLUMN,
    CONVOLUTION,
    FUSED,
    HEADS,
    IN_PROJ,
    KEYS,
    OUT_PROJ,
    PLUS_ONE,
    QUERIES,
    RATE,
    SAME,
    TAPS,
    Change,
)
from distill.export.weights import Rule, same

_LAYER = "model.layers.{i}."
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_BIASED = tuple(f"{name}_proj.{kind}" for name in "qkvo" for kind in ("weight", "bias"))
_GATE, _UP, _DOWN = (f"{_LAYER}mlp.{name}_proj" for name in ("gate", "up", "down"))
# Phi-3 keeps queries, keys and values in one matrix, and gate and up projection in another.
_QKV, _GATE_UP = f"{_LAYER}self_attn.qkv_proj.weight", f"{_LAYER}mlp.gate_up_proj.weight"

# Mixtral: a row of the router for each expert, and all experts' matrices in one tensor, gate above up projection.
_ROUTER, _EXPERTS, _EXPERTS_DOWN = (
    f"{_LAYER}mlp.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
)

# A mixer's tensors, and how heads are added to them where a format wants more.
_MIXER: dict[str, Change] = {
    "in_proj.weight": IN_PROJ,
    "conv1d.weight": CONVOLUTION,
    "conv1d.bias": CONVOLUTION,
    "dt_bias": HEADS,
    "A_log": HEADS,
    "D": HEADS,
    "norm.weight": CHANNELS,
    "out_proj.weight": OUT_PROJ,
    "out_proj.bias": SAME,
}


def _huggingface(norms: tuple[str, str, str], mlp: tuple[Rule, ...], norm: Change) -> tuple[Rule, ...]:
    """What the two classes of transformers have in common."""
    input_norm, mlp_norm, final_norm = norms
    return (
        same("model.embed_tokens.weight"),
        same("model.norm.weight", final_norm, norm),
        same("lm_head.weight"),
        same(_LAYER + _NORMS[0], _LAYER + input_norm, norm),
        same(_LAYER + _NORMS[1], _LAYER + mlp_norm, norm),
        *(same(f"{_LAYER}self_attn.{name}") for name in _BIASED),
        Rule((_QKV,), tuple(f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv")),
        *(same(f"{_LAYER}self_attn.{name}", f"{_LAYER}mamba.{name}", pad) for name, pad in _MIXER.items()),
        *mlp,
    )


def granite(*, norm_plus_one: bool) -> tuple[Rule, ...]:
    """``GraniteMoeHybridForCausalLM``: the gate's rows stand above the up projection's in one matrix.

    Args:
        norm_plus_one: the student's norms multiply with 1 + w.
    """
    fused, output = f"{_LAYER}shared_mlp.input_linear.weight", f"{_LAYER}shared_mlp.output_linear.weight"
    mlp = (
        Rule((f"{_GATE}.weight", f"{_UP}.weight"), (fused,)),
        same(_GATE_UP, fused),
        same(f"{_DOWN}.weight", output),
        same(_ROUTER, f"{_LAYER}block_sparse_moe.router.layer.weight"),
        same(_EXPERTS, f"{_LAYER}block_sparse_moe.input_linear.weight"),
        same(_EXPERTS_DOWN, f"{_LAYER}block_sparse_moe.output_linear.weight"),
    )
    return _huggingface((*_NORMS, "model.norm.weight"), mlp, PLUS_ONE if norm_plus_one else SAME)


def bamba() -> tuple[Rule, ...]:
    """``BambaForCausalLM``."""
    feed_forward = tuple(
        same(f"{ours}.{kind}", ours.replace(".mlp.", ".feed_forward.") + f".{kind}")
        for ours in (_GATE, _UP, _DOWN)
        for kind in ("weight", "bias")
    )
    split = tuple(f"{_LAYER}feed_forward.{name}_proj.weight" for name in ("gate", "up"))
    mlp = (*feed_forward, Rule((_GATE_UP,), split))
    return _huggingface((_NORMS[0], "pre_ff_layernorm.weight", "model.final_layernorm.weight"), mlp, SAME)


def gguf() -> tuple[Rule, ...]:
    """llama.cpp's ``granitehybrid``."""
    attention = {"q_proj": ("attn_q", QUERIES), "k_proj": ("attn_k", KEYS), "v_proj": ("attn_v", SAME)}
    projections = {**attention, "o_proj": ("attn_output", SAME)}
    mixer: dict[str, tuple[str, Change]] = {
        "in_proj.weight": ("ssm_in.weight", SAME),
        "conv1d.weight": ("ssm_conv1d.weight", TAPS),
        "conv1d.bias": ("ssm_conv1d.bias", SAME),
        "dt_bias": ("ssm_dt.bias", SAME),
        "A_log": ("ssm_a", RATE.then(COLUMN)),
        "D": ("ssm_d", COLUMN),
        "norm.weight": ("ssm_norm.weight", BY_HEAD),
        "out_proj.weight": ("ssm_out.weight", SAME),
    }
    mlp = {_GATE: "ffn_gate", _UP: "ffn_up", _DOWN: "ffn_down"}
    return (
        same("model.embed_tokens.weight", "token_embd.weight"),
        same("model.norm.weight", "output_norm.weight"),
        same("lm_head.weight", "output.weight"),
        same(_LAYER + _NORMS[0], "blk.{i}.attn_norm.weight"),
        same(_LAYER + _NORMS[1], "blk.{i}.ffn_norm.weight"),
        *(
            same(f"{_LAYER}self_attn.{ours}.{kind}", f"blk.{{i}}.{theirs}.{kind}", change)
            for ours, (theirs, change) in projections.items()
            for kind in ("weight", "bias")
        ),
        Rule((_QKV,), tuple(f"blk.{{i}}.attn_{x}.weight" for x in "qkv"), FUSED),
        *(
            same(f"{_LAYER}self_attn.{ours}", f"blk.{{i}}.{theirs}", _MIXER[ours].then(change))
            for ours, (theirs, change) in mixer.items()
        ),
        *(
            same(f"{ours}.{kind}", f"blk.{{i}}.{theirs}.{kind}")
            for ours, theirs in mlp.items()
            for kind in ("weight", "bias")
        ),
        Rule((_GATE_UP,), ("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight")),
        same(_ROUTER, "blk.{i}.ffn_gate_inp.weight"),
        Rule((_EXPERTS,), ("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight"), axis=1),
        same(_EXPERTS_DOWN, "blk.{i}.ffn_down_exps.weight"),
    )
