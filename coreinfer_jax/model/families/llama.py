"""LLaMA 1, 2, 3, 3.1, 3.2 (arXiv 2302.13971, 2407.21783): RoPE, RMSNorm, grouped-query attention, gated MLP."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from coreinfer_jax.errors import shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields, read_special_ids
from coreinfer_jax.model.family import Family, GgufNames
from coreinfer_jax.model.layers import attention, lookup, mlp_activations, rms_norm, rotation
from coreinfer_jax.model.rope_fields import ROPE_FIELDS, read_rope, rope_problems, write_rope
from coreinfer_jax.model.weights import Layer, Params

ACTIVATIONS = ("silu", "relu")


def problems(fields: Fields) -> list[str]:
    """What is not implemented of the activation function and of rotary positions."""
    found = rope_problems(fields)
    if fields.get("hidden_act", "silu") in ACTIVATIONS:
        return found
    return [f"hidden_act={shown(fields['hidden_act'])} (only {' and '.join(map(repr, ACTIVATIONS))})", *found]


FIELDS = ConfigFields(
    required=("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    counts=("num_key_value_heads", "head_dim", "max_position_embeddings"),
    switches=("tie_word_embeddings", "attention_bias", "mlp_bias"),
    numbers=("rms_norm_eps", "rope_theta"),
    # The pairs that RoPE rotates are (i, i + H/2); `rope_interleaved` would make them (2i, 2i + 1).
    fixed={"partial_rotary_factor": 1.0, "rope_interleaved": False},
    checked=("hidden_act", *ROPE_FIELDS),
    problems=problems,
)


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    D, N = fields["hidden_size"], fields["num_attention_heads"]
    return ModelConfig(
        family="llama",
        vocab_size=fields["vocab_size"],
        hidden_size=D,
        embed_size=D,
        mlp_size=fields["intermediate_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=N,
        num_kv_heads=fields.get("num_key_value_heads", N),
        head_size=fields.get("head_dim", D // N),
        max_positions=fields.get("max_position_embeddings", 2048),
        activation=fields.get("hidden_act", "silu"),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        tied=fields.get("tie_word_embeddings", False),
        rope=read_rope(fields),
        **read_special_ids(fields),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that LLaMA has besides those of every family."""
    assert config.rope is not None, "a LLaMA model has rotary positions"
    return {
        "hidden_act": config.activation,
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        **write_rope(config.rope),
    }


TENSORS = {
    "token_embedding": "embed_tokens.weight",  # [V, D]
    "layers.{l}.attention_norm.scale": "layers.{l}.input_layernorm.weight",
    "layers.{l}.attention.query.weight": "layers.{l}.self_attn.q_proj.weight",  # [N H, D]
    "layers.{l}.attention.query.bias": "layers.{l}.self_attn.q_proj.bias",  # biases only with attention_bias
    "layers.{l}.attention.key.weight": "layers.{l}.self_attn.k_proj.weight",  # [G H, D]
    "layers.{l}.attention.key.bias": "layers.{l}.self_attn.k_proj.bias",
    "layers.{l}.attention.value.weight": "layers.{l}.self_attn.v_proj.weight",  # [G H, D]
    "layers.{l}.attention.value.bias": "layers.{l}.self_attn.v_proj.bias",
    "layers.{l}.attention.out.weight": "layers.{l}.self_attn.o_proj.weight",  # [D, N H]
    "layers.{l}.attention.out.bias": "layers.{l}.self_attn.o_proj.bias",
    "layers.{l}.mlp_norm.scale": "layers.{l}.post_attention_layernorm.weight",
    "layers.{l}.mlp.gate.weight": "layers.{l}.mlp.gate_proj.weight",  # [F, D]
    "layers.{l}.mlp.gate.bias": "layers.{l}.mlp.gate_proj.bias",  # biases only with mlp_bias
    "layers.{l}.mlp.up.weight": "layers.{l}.mlp.up_proj.weight",  # [F, D]
    "layers.{l}.mlp.up.bias": "layers.{l}.mlp.up_proj.bias",
    "layers.{l}.mlp.down.weight": "layers.{l}.mlp.down_proj.weight",  # [D, F]
    "layers.{l}.mlp.down.bias": "layers.{l}.mlp.down_proj.bias",
    "final_norm.scale": "norm.weight",
    "unembedding": "lm_head.weight",  # [V, D], absent when tied
}


GGUF = GgufNames(
    architecture="llama",
    fields={
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "rope.dimension_count",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
    },
    tensors={
        "token_embedding": "token_embd.weight",
        "layers.{l}.attention_norm.scale": "blk.{l}.attn_norm.weight",
        "layers.{l}.attention.query.weight": "blk.{l}.attn_q.weight",
        "layers.{l}.attention.query.bias": "blk.{l}.attn_q.bias",
        "layers.{l}.attention.key.weight": "blk.{l}.attn_k.weight",
        "layers.{l}.attention.key.bias": "blk.{l}.attn_k.bias",
        "layers.{l}.attention.value.weight": "blk.{l}.attn_v.weight",
        "layers.{l}.attention.value.bias": "blk.{l}.attn_v.bias",
        "layers.{l}.attention.out.weight": "blk.{l}.attn_output.weight",
        "layers.{l}.attention.out.bias": "blk.{l}.attn_output.bias",
        "layers.{l}.mlp_norm.scale": "blk.{l}.ffn_norm.weight",
        "layers.{l}.mlp.gate.weight": "blk.{l}.ffn_gate.weight",
        "layers.{l}.mlp.gate.bias": "blk.{l}.ffn_gate.bias",
        "layers.{l}.mlp.up.weight": "blk.{l}.ffn_up.weight",
        "layers.{l}.mlp.up.bias": "blk.{l}.ffn_up.bias",
        "layers.{l}.mlp.down.weight": "blk.{l}.ffn_down.weight",
        "layers.{l}.mlp.down.bias": "blk.{l}.ffn_down.bias",
        "final_norm.scale": "output_norm.weight",
        "unembedding": "output.weight",
    },
    by_pairs=("attention.query", "attention.key"),
)


def embed(params: Params, tokens: Array, positions: Array) -> tuple[Array, tuple[Array, Array]]:
    """Token embeddings [B, T, D] of tokens [B, T], and the rotation of `positions` [B, T] that every layer applies."""
    assert params.config.rope is not None, "a LLaMA model has rotary positions"
    return lookup(params.token_embedding, tokens), rotation(positions, params.config.head_size, params.config.rope)


@jax.named_scope("block")
def block(
    x: Array,
    layer: Layer,
    past: tuple[Array, Array],
    positions: Array,
    context: tuple[Array, Array],
    edit: Callable[[Array, Array], Array],
    config: ModelConfig,
) -> tuple[Array, tuple[Array, Array], Array]:
    """One layer over x [B, T, D]: the new x, the extended keys and values, the MLP activations [B, T, F]."""
    normed = rms_norm(x, layer.attention_norm, config.norm_eps)
    attended, past = attention(normed, layer.attention, past, positions, context, config)
    x = x + attended
    activations, gated = mlp_activations(rms_norm(x, layer.mlp_norm, config.norm_eps), layer.mlp, config)
    return x + layer.mlp.down(edit(activations, gated)), past, activations


def finish(params: Params, x: Array) -> Array:
    """Last norm: x [B, T, D] to [B, T, D]."""
    assert params.final_norm is not None, "a LLaMA model has a final norm"
    return rms_norm(x, params.final_norm, params.config.norm_eps)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    fields=FIELDS,
    read_config=read_config,
    write_config=write_config,
    tensors=TENSORS,
    # Old exports carry RoPE's frequencies as buffers; they follow from the config.
    ignored_tensors=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",),
    embed=embed,
    block=block,
    finish=finish,
    gguf=GGUF,
)
