"""The decoder that every family is: embed, L blocks over a KV cache, last norm, output projection."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from coreinfer_jax.model.backends import before_the_next, matmul
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.families import family_of
from coreinfer_jax.model.layers import MlpPass, soft_capped
from coreinfer_jax.model.shards import joined
from coreinfer_jax.model.weights import Layer, Params

Observed = TypeVar("Observed")
# What is kept of layer l, of its number, its weights, and what its MLP read and made.
Observe = Callable[[int, Layer, MlpPass], Observed]
# What the down projection of layer l reads, [B, T, F], of the same.
Edit = Callable[[int, Layer, MlpPass], Array]


def observe_nothing(l: int, layer: Layer, seen: MlpPass) -> None:
    """The `observe` of passes that keep no activations."""


def as_they_are(l: int, layer: Layer, seen: MlpPass) -> Array:
    """The `edit` of passes that compute what the model computes."""
    return seen.activations


def extend(
    params: Params,
    tokens: Array,
    cache: KVCache,
    start: Array,
    observe: Observe[Observed],
    edit: Edit = as_they_are,
    filled: int | None = None,
    in_blocks: bool = False,
) -> tuple[Array, KVCache, tuple[Observed, ...]]:
    """Run T more tokens of every row through the model.

    A jit around it that reads up to 4 tokens is fast on a CPU with `backends.ANY_ORDER` as its compiler options.

    Prefill is this function with many tokens, decode with one, scoring a text with an empty cache. Narrowed and dense
    models run the same code: widths are read off the arrays.

    Args:
        params: dense or narrowed weights.
        tokens: int32 [B, T]; ids must lie in 0 .. V-1 (checked where tokens enter the library).
        cache: what the rows have seen so far; room for start + T positions per row, padding excepted.
        start: int32 [B], position of each row's first token.
        observe: called as `observe(l, layer, seen)` with the layer's number, its weights and the `MlpPass` of its MLP:
            what to keep of that, for instance votes. It runs inside the layer, so that no more than one layer's
            activations are alive at a time.
        edit: called as `edit(l, layer, seen)`: what the down projection reads instead of the activations [B, T, F], for
            studies of the model. `observe` sees the activations as they were.
        filled: static, at least start + T of every row: so many slots of the cache are attended to. None for all. A
            prefill with little in a large cache costs less with it.
        in_blocks: static, whether scores are made for a block of the cache at a time, and only as far as it is filled:
            for many tokens, or few with a long past. Such a pass has no derivative in reverse.

    Returns:
        Hidden states [B, T, E] ready for `unembed`, the extended cache, and one `observe` result per layer.
    """
    family = family_of(params.config)
    positions = start[:, None] + jax.lax.iota(start.dtype, tokens.shape[1])[None, :]
    x, contexts = family.embed(params, tokens, positions, cache.capacity)
    written, observed = [], []
    pasts = zip(cache.keys, cache.values, strict=True)
    for l, (layer, past, context) in enumerate(zip(params.layers, pasts, contexts, strict=True)):
        own_edit, context = partial(edit, l, layer), replace(context, filled=filled, in_blocks=in_blocks)
        x, extended, seen = family.block(x, layer, past, positions, context, own_edit, params.config)
        written.append(extended)
        x, kept = before_the_next((x, observe(l, layer, seen)))
        observed.append(kept)
    keys, values = zip(*written, strict=True)
    return family.finish(params, x), KVCache(keys=keys, values=values), tuple(observed)


def embed(params: Params, tokens: Array, start: Array, capacity: int) -> Array:
    """What the first layer reads, [B, T, D], of tokens [B, T] from `start` [B] on; layers are not looked at.

    With `extend_layer` for every layer and `finish` this is `extend`, for models whose layers come one by one.
    """
    positions = start[:, None] + jax.lax.iota(start.dtype, tokens.shape[1])[None, :]
    return family_of(params.config).embed(params, tokens, positions, capacity)[0]


def extend_layer(
    params: Params,
    like: int,
    layer: Layer,
    x: Array,
    past: tuple[Array, Array],
    start: Array,
    observe: Observe[Observed],
    filled: int | None = None,
    in_blocks: bool = False,
) -> tuple[Array, tuple[Array, Array], Observed]:
    """One layer of `extend`.

    Args:
        params: the weights besides those of layers.
        like: static, the number of a layer that sees as far as this one and rotates alike, so that such layers share a
            program (`first_alike`); `observe` is called with it.
        layer: its weights.
        x: what it reads, [B, T, D].
        past: its cached keys and values, each [B, G, S, H].
        start: int32 [B], position of each row's first token.
        observe: as for `extend`.
        filled: as for `extend`.
        in_blocks: as for `extend`.

    Returns:
        What the next layer reads, the extended keys and values, and what was observed.
    """
    B, T, _ = x.shape
    positions = start[:, None] + jax.lax.iota(start.dtype, T)[None, :]
    family = family_of(params.config)
    # Only the contexts are used, which no token has a part in; the compiler leaves out the embedding.
    _, contexts = family.embed(params, jnp.zeros((B, T), jnp.int32), positions, past[0].shape[2])
    context = replace(contexts[like], filled=filled, in_blocks=in_blocks)
    x, past, seen = family.block(x, layer, past, positions, context, partial(as_they_are, like, layer), params.config)
    x, kept = before_the_next((x, observe(like, layer, seen)))
    return x, past, kept


def first_alike(config: ModelConfig) -> tuple[int, ...]:
    """Per layer, the first one that sees as far and rotates alike."""
    L = config.num_layers
    kinds = list(zip(config.windows or (None,) * L, config.rotated or (True,) * L, strict=True))
    return tuple(kinds.index(kind) for kind in kinds)


def finish(params: Params, x: Array) -> Array:
    """Hidden states [B, T, E] ready for `unembed`, of what the last layer makes, [B, T, D]."""
    return family_of(params.config).finish(params, x)


@jax.named_scope("unembed")
def unembed(params: Params, hidden: Array) -> Array:
    """Logits float32 [B, T, V] of hidden states [B, T, E]."""
    table = params.token_embedding if params.unembedding is None else params.unembedding
    logits = matmul(hidden, table)
    return soft_capped(logits if len(table) == params.config.vocab_size else joined(logits), params.config.logit_cap)
