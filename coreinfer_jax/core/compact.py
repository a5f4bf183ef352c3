"""Narrowed weights: the MLPs of a model cut down to core neurons, by one gather per prompt."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from coreinfer_jax.core.neurons import CoreNeurons
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.params import Linear, Mlp, Params, check_params, leaf_bytes

Indices = tuple[Array | None, ...]


def compact(params: Params, core: CoreNeurons) -> Params:
    """`params` with every MLP narrowed to its core neurons; all other weights are shared, not copied.

    The result computes what the full model computes with all other neurons' activations set to zero.

    Args:
        params: dense weights.
        core: K indices per layer, or [B, K] with one set per row of the batches the result is meant for; layers
            given as None stay dense.

    Returns:
        `Params` whose narrowed MLPs have gate and up [K, D] and down [D, K], or the same with a leading B.

    Raises:
        CoreInferError: `core` does not fit the model, or `params` are narrowed already.
    """
    check_core(core)
    check_dense(params)
    core.check(params.config)
    return narrow(params, tuple(None if indices is None else jnp.asarray(indices) for indices in core.layers))


def check_dense(params: Params) -> None:
    """Refuse parameters that have been narrowed: their neurons are numbered differently."""
    check_params(params)
    dense = (params.config.mlp_size, params.config.hidden_size)
    if any(layer.mlp.up.weight.shape != dense for layer in params.layers):
        raise CoreInferError("params are narrowed to core neurons already: give the dense params of the model")


def check_core(core: object) -> None:
    """Refuse what is no `CoreNeurons`, such as the `CoreConfig` to choose them with."""
    if not isinstance(core, CoreNeurons):
        raise CoreInferError(f"core={shown(core)}: give CoreNeurons, for instance those of a Generation")


def narrow(params: Params, indices: Indices) -> Params:
    """`compact` with one index array per layer on the device, [K] or [B, K], or None for a dense layer."""
    return _with_mlps(params, indices, _gather)


def narrowed_shapes(params: Params, indices: Indices) -> Params:
    """The shapes and types of what `narrow` returns, in place of its narrowed arrays."""
    return _with_mlps(params, indices, _gather.eval_shape)


def _with_mlps(params: Params, indices: Indices, gather: Callable[[list[Mlp], list[Array]], list[Mlp]]) -> Params:
    """`params` with the MLPs of all layers that `indices` narrow replaced by what `gather` makes of them."""
    chosen = {l: layer_indices for l, layer_indices in enumerate(indices) if layer_indices is not None}
    # Only the MLPs pass through the compiled gather: whatever a jit returns untouched it copies.
    gathered = gather([params.layers[l].mlp for l in chosen], list(chosen.values()))
    narrowed = dict(zip(chosen, gathered, strict=True))
    layers = tuple(replace(layer, mlp=narrowed[l]) if l in narrowed else layer for l, layer in enumerate(params.layers))
    return replace(params, layers=layers)


def narrowed_bytes(params: Params, layers: tuple[int, ...], kept: int, sets: int) -> int:
    """Bytes of matrices that `narrow` adds to dense `params`: `layers` cut to `kept` neurons, `sets` times."""
    matrices = [
        m for l in layers for m in (params.layers[l].mlp.gate, params.layers[l].mlp.up, params.layers[l].mlp.down)
    ]
    weights = sum(leaf_bytes(m.weight) for m in matrices if m is not None)
    return weights // params.config.mlp_size * kept * sets


@jax.jit
def _gather(mlps: list[Mlp], indices: list[Array]) -> list[Mlp]:
    return [_gather_mlp(mlp, chosen) for mlp, chosen in zip(mlps, indices, strict=True)]


def _gather_mlp(mlp: Mlp, indices: Array) -> Mlp:
    down = Linear(weight=_take(mlp.down.weight, indices, axis=1), bias=mlp.down.bias)
    return Mlp(
        gate=None if mlp.gate is None else _gather_rows(mlp.gate, indices), up=_gather_rows(mlp.up, indices), down=down
    )


def _gather_rows(linear: Linear, indices: Array) -> Linear:
    bias = None if linear.bias is None else _take(linear.bias, indices, axis=0)
    return Linear(weight=_take(linear.weight, indices, axis=0), bias=bias)


def _take(weight: Array, indices: Array, axis: int) -> Array:
    """Entries of `weight` along `axis`, for indices [K]; with indices [B, K] a leading B."""
    if indices.ndim == 2:
        return jax.vmap(lambda row: _take(weight, row, axis))(indices)
    return jnp.take(weight, indices, axis=axis, mode="clip")
