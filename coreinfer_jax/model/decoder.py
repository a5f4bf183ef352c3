"""The decoder both families are: embed, L blocks over a KV cache, last norm, output projection."""

from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import jax
from jax import Array

from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.families import llama, opt
from coreinfer_jax.model.layers import matmul
from coreinfer_jax.model.weights import Params

Observed = TypeVar("Observed")
# What the down projection reads, of a layer's activations and of what the activation function gave, [B, T, F] each.
Edit = Callable[[Array, Array], Array]

# A family is three functions: embed(params, tokens, positions) -> x, context;
# block(x, layer, past, positions, context, edit, config) -> x, past, activations; finish(params, x) -> x.
_FAMILIES: dict[str, ModuleType] = {"opt": opt, "llama": llama}


def observe_nothing(activations: Array) -> None:
    """The `observe` of passes that keep no activations."""


def as_they_are(activations: Array, gated: Array) -> Array:
    """The `edit` of passes that compute what the model computes."""
    return activations


def extend(
    params: Params,
    tokens: Array,
    cache: KVCache,
    start: Array,
    observe: Callable[[Array], Observed],
    edit: Edit = as_they_are,
) -> tuple[Array, KVCache, tuple[Observed, ...]]:
    """Run T more tokens of every row through the model.

    Prefill is this function with many tokens, decode with one, scoring a text with an empty cache. Narrowed and dense
    models run the same code: widths are read off the arrays.

    Args:
        params: dense or narrowed weights.
        tokens: int32 [B, T]; ids must lie in 0 .. V-1 (checked where tokens enter the library).
        cache: what the rows have seen so far; room for start + T positions per row, padding excepted.
        start: int32 [B], position of each row's first token.
        observe: what to keep of each layer's MLP activations [B, T, F], for instance votes; it runs inside the
            layer, so that no more than one layer's activations are alive at a time.
        edit: what the down projection reads instead of the activations [B, T, F], for studies of the model; also told
            what the activation function gave, with a gate before it is multiplied; `observe` sees the activations.

    Returns:
        Hidden states [B, T, E] ready for `unembed`, the extended cache, and one `observe` result per layer.
    """
    family = _FAMILIES[params.config.family]
    positions = start[:, None] + jax.lax.iota(start.dtype, tokens.shape[1])[None, :]
    x, context = family.embed(params, tokens, positions)
    written, observed = [], []
    for layer, past in zip(params.layers, zip(cache.keys, cache.values, strict=True), strict=True):
        x, past, activations = family.block(x, layer, past, positions, context, edit, params.config)
        written.append(past)
        observed.append(observe(activations))
    keys, values = zip(*written, strict=True)
    return family.finish(params, x), KVCache(keys=keys, values=values), tuple(observed)


@jax.named_scope("unembed")
def unembed(params: Params, hidden: Array) -> Array:
    """Logits float32 [B, T, V] of hidden states [B, T, E]."""
    table = params.token_embedding if params.unembedding is None else params.unembedding
    return matmul(hidden, table)
