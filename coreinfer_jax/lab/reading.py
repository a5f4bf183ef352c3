"""How the laboratory reads texts: in batches of one shape, each passed whole through the full model."""

from collections.abc import Iterator
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.model import Observe, extend
from coreinfer_jax.model.cache import KVCache, init_cache
from coreinfer_jax.model.weights import Params
from coreinfer_jax.progress import progress

Kept = TypeVar("Kept")


def batches(texts: int, rows: int, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """What `planned` says, with a bar of this name."""
    yield from progress(planned(texts, rows), desc=name, unit="batch")


def planned(texts: int, rows: int) -> list[tuple[np.ndarray, int]]:
    """The numbers of `texts` texts, at most `rows` in a batch, and how many of each batch are real.

    The last batch is filled up with its first text: one shape, so that one program serves them all.
    """
    if not texts:
        return []
    B = -(-texts // -(-texts // max(1, rows)))  # batches are about as full as each other
    parts = [np.arange(first, min(first + B, texts)) for first in range(0, texts, B)]
    return [(np.concatenate([part, np.full(B - len(part), part[0])]), len(part)) for part in parts]


def read_whole(
    params: Params, tokens: Array, observe: Observe[tuple[Kept, Array]]
) -> tuple[Array, KVCache, list[Kept], Array]:
    """A pass over tokens int32 [B, T] from their start, for programs to be compiled.

    Args:
        params: dense weights.
        tokens: padding must follow the tokens of a row.
        observe: as of `extend`: what is to be kept of a layer, and whether it is finite, bool [].

    Returns:
        Hidden states [B, T, E], the cache, what was kept of every layer, whether all of it was finite, bool [].
    """
    B, T = tokens.shape
    cache = init_cache(params.config, B, T, params.dtype)
    hidden, cache, observed = extend(params, tokens, cache, jnp.zeros(B, jnp.int32), observe)
    kept, finite = zip(*observed, strict=True)
    return hidden, cache, list(kept), jnp.stack(finite).all()
