"""The computation of decoders with rotary positions, RMSNorm and a gated MLP: LLaMA and its relatives."""

from collections.abc import Callable

import jax
from jax import Array

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.layers import LayerContext, attention, lookup, mlp_activations, rms_norm, rotation
from coreinfer_jax.model.weights import Layer, Params


def embed(params: Params, tokens: Array, positions: Array) -> tuple[Array, tuple[LayerContext, ...]]:
    """Token embeddings [B, T, D] of tokens [B, T]; the rotation of `positions` [B, T] and the window of each layer."""
    return lookup(params.token_embedding, tokens), layer_contexts(positions, params.config)


def layer_contexts(positions: Array, config: ModelConfig) -> tuple[LayerContext, ...]:
    """What each layer is told of tokens at `positions` [B, T]."""
    assert config.rope is not None, "the model has rotary positions"
    turned = rotation(positions, config.head_size, config.rope)
    return tuple(LayerContext(turned, window) for window in config.windows or (None,) * config.num_layers)


@jax.named_scope("block")
def block(
    x: Array,
    layer: Layer,
    past: tuple[Array, Array],
    positions: Array,
    context: LayerContext,
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
    assert params.final_norm is not None, "the model has a final norm"
    return rms_norm(x, params.final_norm, params.config.norm_eps)
