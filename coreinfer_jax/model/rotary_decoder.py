"""The computation of decoders with rotary positions, RMSNorm and a gated MLP: LLaMA and its relatives."""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array

from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.family import Family
from coreinfer_jax.model.layers import (
    LayerContext,
    MlpPass,
    attention,
    embeddings,
    mlp_output,
    mlp_pass,
    rms_normed,
    rotation,
)
from coreinfer_jax.model.rotary_tables import IGNORED_TENSORS
from coreinfer_jax.model.weights import Layer, Params


def embed(params: Params, tokens: Array, positions: Array, capacity: int) -> tuple[Array, tuple[LayerContext, ...]]:
    """Token embeddings [B, T, D] of tokens [B, T]; the rotation of `positions` [B, T] and the window of each layer."""
    return embeddings(params, tokens), layer_contexts(positions, capacity, params.config)


def layer_contexts(positions: Array, capacity: int, config: ModelConfig) -> tuple[LayerContext, ...]:
    """What each layer is told of tokens at `positions` [B, T], in a run with room for `capacity` (S)."""
    assert config.rope is not None, "the model has rotary positions"

    def turned_by(rope: Rope) -> tuple[Array, Array]:
        return rotation(positions, config.head_size, rope, capacity)

    turned = turned_by(config.rope)
    local = turned if config.local_rope is None else turned_by(config.local_rope)
    windows = config.windows or (None,) * config.num_layers
    rotated = config.rotated or (True,) * config.num_layers
    return tuple(
        LayerContext((turned if window is None else local) if rotates else None, window)
        for window, rotates in zip(windows, rotated, strict=True)
    )


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
    normed = rms_normed(x, layer.attention_norm, config)
    attended, past = attention(normed, layer.attention, past, positions, context, config)
    x = x + rms_normed(attended, layer.attention_out_norm, config)
    seen = mlp_pass(rms_normed(x, layer.mlp_norm, config), layer.mlp, config)
    added = mlp_output(seen, edit(seen), layer.mlp)
    return x + rms_normed(added, layer.mlp_out_norm, config), past, seen


def finish(params: Params, x: Array) -> Array:
    """Last norm: x [B, T, D] to [B, T, D]."""
    assert params.final_norm is not None, "the model has a final norm"
    return rms_normed(x, params.final_norm, params.config)


# A family that computes as the functions above do, unless it names others.
rotary_family = partial(Family, ignored_tensors=IGNORED_TENSORS, embed=embed, block=block, finish=finish)
