"""Predicting core neurons from a prompt: who votes, and the neurons each layer keeps (paper, section 3.3)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.config import CoreConfig, ModelConfig
from coreinfer_jax.core.compact import Indices
from coreinfer_jax.core.neurons import CoreNeurons
from coreinfer_jax.core.select import Votes, kept_neurons, most_voted, pooled
from coreinfer_jax.errors import CoreInferError


def narrowed_layers(core: CoreConfig, config: ModelConfig) -> tuple[int, ...]:
    """The layers that are cut down to core neurons.

    Raises:
        CoreInferError: there are none.
    """
    layers = tuple(l for l in range(config.num_layers) if core.narrows(l, config.num_layers))
    if not layers:
        raise CoreInferError(f"layers={core.layers} selects none of the model's {config.num_layers} layers; widen it")
    return layers


def counted_tokens(
    core: CoreConfig, tokens: np.ndarray, lengths: np.ndarray, cached: int, config: ModelConfig
) -> np.ndarray:
    """Which of tokens [B, T] vote: bool [B, T], not padding, and not a leading BOS where the setting excludes it.

    Args:
        core: the setting.
        tokens: padded rows.
        lengths: int32 [B], tokens per row before padding.
        cached: tokens per row that were read, and have voted, before.
        config: the model.

    Raises:
        CoreInferError: a row without any.
    """
    counted = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
    if not core.count_bos and config.bos_id is not None and not cached:
        counted[:, 0] &= tokens[:, 0] != config.bos_id
    if not counted.any(axis=1).all():
        raise CoreInferError("a prompt of BOS alone has no token to vote with count_bos=False: lengthen it")
    return counted


def stability_indices(core: CoreConfig, votes: list[Votes], config: ModelConfig, rows: int) -> Indices:
    """The prompt's own sentence-wise core neurons, one index array per layer: stability-guided prediction.

    Args:
        core: how to choose.
        votes: of each narrowed layer, [B, F].
        config: the model.
        rows: B. A single row's set is given as a shared one [K], so that it runs the plain program.
    """
    kept = kept_neurons(core.beta, config.mlp_size)
    chosen = _select(votes, kept=kept, shared=not core.per_row or rows == 1)
    by_layer = dict(zip(narrowed_layers(core, config), chosen, strict=True))
    return tuple(by_layer.get(l) for l in range(config.num_layers))


def given_indices(core: CoreNeurons) -> Indices:
    """The index arrays of core neurons on the device, a single row's set as a shared one."""
    single = core.row(0) if core.rows == 1 else core
    return tuple(None if indices is None else jnp.asarray(indices) for indices in single.layers)


@partial(jax.jit, static_argnames=("kept", "shared"))
def _select(votes: list[Votes], *, kept: int, shared: bool) -> list[Array]:
    return [most_voted(pooled(layer) if shared else layer, kept) for layer in votes]
