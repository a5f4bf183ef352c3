"""OPT (arXiv 2205.01068): learned positions, LayerNorm, biases, ReLU MLP; 350m normalises after each residual sum."""

from collections.abc import Callable

import jax
from jax import Array

from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.layers import attention, layer_norm, linear, lookup, mlp_activations
from coreinfer_jax.model.weights import Layer, Norm, Params

# Rows 0 and 1 of OPT's position table are leftovers of its padding scheme.
POSITION_OFFSET = 2


def embed(params: Params, tokens: Array, positions: Array) -> tuple[Array, None]:
    """Token plus position embeddings of tokens [B, T] at `positions` [B, T]: [B, T, D]."""
    x = lookup(params.token_embedding, tokens)
    if params.project_in is not None:
        x = linear(x, params.project_in)
    assert params.position_embedding is not None, "an OPT model has a position table"
    return x + lookup(params.position_embedding, positions + POSITION_OFFSET), None


@jax.named_scope("block")
def block(
    x: Array,
    layer: Layer,
    past: tuple[Array, Array],
    positions: Array,
    context: None,
    edit: Callable[[Array, Array], Array],
    config: ModelConfig,
) -> tuple[Array, tuple[Array, Array], Array]:
    """One layer over x [B, T, D]: the new x, the extended keys and values, the MLP activations [B, T, F]."""

    def before(x: Array, norm: Norm) -> Array:
        return layer_norm(x, norm, config.norm_eps) if config.norm_first else x

    def after(x: Array, norm: Norm) -> Array:
        return x if config.norm_first else layer_norm(x, norm, config.norm_eps)

    attended, past = attention(before(x, layer.attention_norm), layer.attention, past, positions, context, config)
    x = after(x + attended, layer.attention_norm)
    activations, gated = mlp_activations(before(x, layer.mlp_norm), layer.mlp, config)
    x = after(x + linear(edit(activations, gated), layer.mlp.down), layer.mlp_norm)
    return x, past, activations


def finish(params: Params, x: Array) -> Array:
    """Last norm and projection back to the embedding width: x [B, T, D] to [B, T, E]."""
    if params.final_norm is not None:
        x = layer_norm(x, params.final_norm, params.config.norm_eps)
    return x if params.project_out is None else linear(x, params.project_out)
