"""LLaMA 1, 2, 3, 3.1, 3.2 (arXiv 2302.13971, 2407.21783): RoPE, RMSNorm, grouped-query attention, gated MLP."""

from collections.abc import Callable

import jax
from jax import Array

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.layers import attention, linear, lookup, mlp_activations, rms_norm, rotation
from coreinfer_jax.model.weights import Layer, Params


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
    return x + linear(edit(activations, gated), layer.mlp.down), past, activations


def finish(params: Params, x: Array) -> Array:
    """Last norm: x [B, T, D] to [B, T, D]."""
    assert params.final_norm is not None, "a LLaMA model has a final norm"
    return rms_norm(x, params.final_norm, params.config.norm_eps)
