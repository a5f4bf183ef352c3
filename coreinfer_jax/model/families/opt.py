"""OPT (arXiv 2205.01068): learned positions, LayerNorm, biases, ReLU MLP; 350m normalises after each residual sum."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields, read_special_ids
from coreinfer_jax.model.family import Family
from coreinfer_jax.model.layers import (
    LayerContext,
    MlpPass,
    attention,
    embeddings,
    layer_norm,
    lookup,
    mlp_output,
    mlp_pass,
)
from coreinfer_jax.model.weights import Layer, Norm, Params

# Rows 0 and 1 of OPT's position table are leftovers of its padding scheme.
POSITION_OFFSET = 2

FIELDS = ConfigFields(
    required=("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "num_attention_heads"),
    counts=("word_embed_proj_dim", "max_position_embeddings"),
    switches=("tie_word_embeddings", "do_layer_norm_before", "_remove_final_layer_norm", "enable_bias"),
    fixed={"activation_function": "relu", "layer_norm_elementwise_affine": True},
)


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    D, N = fields["hidden_size"], fields["num_attention_heads"]
    bias = fields.get("enable_bias", True)
    norm_first = fields.get("do_layer_norm_before", True)
    return ModelConfig(
        family="opt",
        vocab_size=fields["vocab_size"],
        hidden_size=D,
        embed_size=fields.get("word_embed_proj_dim", D),
        mlp_size=fields["ffn_dim"],
        num_layers=fields["num_hidden_layers"],
        num_heads=N,
        num_kv_heads=N,
        head_size=D // N,
        max_positions=fields.get("max_position_embeddings", 2048),
        activation="relu",
        norm_eps=1e-5,  # PyTorch's default; OPT configs do not state it
        norm_first=norm_first,
        final_norm=norm_first and not fields.get("_remove_final_layer_norm", False),
        attention_bias=bias,
        mlp_bias=bias,
        tied=fields.get("tie_word_embeddings", True),
        **read_special_ids(fields),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that OPT has besides those of every family."""
    return {
        "activation_function": config.activation,
        "ffn_dim": config.mlp_size,
        "word_embed_proj_dim": config.embed_size,
        "do_layer_norm_before": config.norm_first,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "enable_bias": config.mlp_bias,
        "dropout": 0.0,
    }


TENSORS = {
    "token_embedding": "decoder.embed_tokens.weight",  # [V, E]
    "position_embedding": "decoder.embed_positions.weight",  # [P + 2, D]
    "project_in.weight": "decoder.project_in.weight",  # [D, E], 350m only
    "project_out.weight": "decoder.project_out.weight",  # [E, D], 350m only
    "layers.{l}.attention_norm.scale": "decoder.layers.{l}.self_attn_layer_norm.weight",
    "layers.{l}.attention_norm.bias": "decoder.layers.{l}.self_attn_layer_norm.bias",
    "layers.{l}.attention.query.weight": "decoder.layers.{l}.self_attn.q_proj.weight",  # [D, D]
    "layers.{l}.attention.query.bias": "decoder.layers.{l}.self_attn.q_proj.bias",
    "layers.{l}.attention.key.weight": "decoder.layers.{l}.self_attn.k_proj.weight",
    "layers.{l}.attention.key.bias": "decoder.layers.{l}.self_attn.k_proj.bias",
    "layers.{l}.attention.value.weight": "decoder.layers.{l}.self_attn.v_proj.weight",
    "layers.{l}.attention.value.bias": "decoder.layers.{l}.self_attn.v_proj.bias",
    "layers.{l}.attention.out.weight": "decoder.layers.{l}.self_attn.out_proj.weight",
    "layers.{l}.attention.out.bias": "decoder.layers.{l}.self_attn.out_proj.bias",
    "layers.{l}.mlp_norm.scale": "decoder.layers.{l}.final_layer_norm.weight",
    "layers.{l}.mlp_norm.bias": "decoder.layers.{l}.final_layer_norm.bias",
    "layers.{l}.mlp.up.weight": "decoder.layers.{l}.fc1.weight",  # [F, D]
    "layers.{l}.mlp.up.bias": "decoder.layers.{l}.fc1.bias",
    "layers.{l}.mlp.down.weight": "decoder.layers.{l}.fc2.weight",  # [D, F]
    "layers.{l}.mlp.down.bias": "decoder.layers.{l}.fc2.bias",
    "final_norm.scale": "decoder.final_layer_norm.weight",  # absent in 350m
    "final_norm.bias": "decoder.final_layer_norm.bias",
    "unembedding": "lm_head.weight",  # [V, E], untied checkpoints only
}


def embed(params: Params, tokens: Array, positions: Array, capacity: int) -> tuple[Array, tuple[LayerContext, ...]]:
    """Token plus position embeddings of tokens [B, T] at `positions` [B, T]: [B, T, D]."""
    x = embeddings(params, tokens)
    if params.project_in is not None:
        x = params.project_in(x)
    assert params.position_embedding is not None, "an OPT model has a position table"
    x = x + lookup(params.position_embedding, positions + POSITION_OFFSET)
    return x, (LayerContext(),) * params.config.num_layers


@jax.named_scope("block")
def block(
    x: Array,
    layer: Layer,
    past: tuple[Array, Array],
    positions: Array,
    context: LayerContext,
    edit: Callable[[MlpPass], Array],
    config: ModelConfig,
) -> tuple[Array, tuple[Array, Array], MlpPass]:
    """One layer over x [B, T, D]: the new x, the extended keys and values, what the MLP read and made."""

    def before(x: Array, norm: Norm) -> Array:
        return layer_norm(x, norm, config.norm_eps) if config.norm_first else x

    def after(x: Array, norm: Norm) -> Array:
        return x if config.norm_first else layer_norm(x, norm, config.norm_eps)

    attended, past = attention(before(x, layer.attention_norm), layer.attention, past, positions, context, config)
    x = after(x + attended, layer.attention_norm)
    seen = mlp_pass(before(x, layer.mlp_norm), layer.mlp, config)
    x = after(x + mlp_output(seen, edit(seen), layer.mlp), layer.mlp_norm)
    return x, past, seen


def finish(params: Params, x: Array) -> Array:
    """Last norm and projection back to the embedding width: x [B, T, D] to [B, T, E]."""
    if params.final_norm is not None:
        x = layer_norm(x, params.final_norm, params.config.norm_eps)
    return x if params.project_out is None else params.project_out(x)


FAMILY = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    fields=FIELDS,
    read_config=read_config,
    write_config=write_config,
    tensors=TENSORS,
    ignored_tensors=(r"decoder\.version",),  # a leftover of the original training code
    position_offset=POSITION_OFFSET,
    embed=embed,
    block=block,
    finish=finish,
)
