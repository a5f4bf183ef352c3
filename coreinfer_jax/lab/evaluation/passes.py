"""The passes of an evaluation: the full model over a text, then any choice of neurons over its continuation.

A choice acts as masks over the activations, not as narrowed weights, so that one program serves every rule and keep
ratio; the numbers are those of narrowed weights. Continuations are read in one pass over the context's cache, which
equals token by token decoding.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from coreinfer_jax.lab.reading import read_whole
from coreinfer_jax.model import Edit, MlpPass, extend, observe_nothing, unembed
from coreinfer_jax.model.cache import KVCache, init_cache
from coreinfer_jax.model.weights import Layer, Params
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.rules import Observer, Sums


@struct.dataclass
class Reading:
    """What the full model made of texts.

    Attributes:
        logits: float32 [B, T, V], of the T positions of the continuation.
        contexts: int32 [B], tokens of each row before its continuation.
        cache: keys and values of the context, and beyond it the full model's, which a later pass overwrites.
        sums: per layer and observer, over the context and over the continuation.
        finite: bool [], whether all logits were finite.
    """

    logits: Array
    contexts: Array
    cache: KVCache
    sums: list[list[tuple[Sums, Sums]]]
    finite: Array


@struct.dataclass
class Differences:
    """How a narrowed model's predictions differ from the full model's, at each position of a continuation, [B, T].

    Attributes:
        kl: float32, KL(full || narrowed) of the next token's distribution, in nats.
        agreement: float32, 1 where both have the same most probable token.
        loss: float32, -log of the probability that the narrowed model gives the text's next token.
    """

    kl: Array
    agreement: Array
    loss: Array


@partial(jax.jit, static_argnames="scored")
def read(
    params: Params, tokens: Array, contexts: Array, observers: list[tuple[Observer, Observer]], *, scored: int
) -> Reading:
    """The full model over tokens int32 [B, W].

    Args:
        params: dense weights.
        tokens: of each row its context, its continuation, and anything behind that.
        contexts: int32 [B], tokens of the contexts.
        observers: what to sum up of the contexts, and of the continuations.
        scored: tokens of a continuation (T).
    """

    def observe(l: int, layer: Layer, seen: MlpPass) -> list[tuple[Sums, Sums]]:
        return [(before(l, layer, seen), after(l, layer, seen)) for before, after in observers]

    cache = init_cache(params.config, *tokens.shape, params.dtype)
    hidden, cache, sums = extend(params, tokens, cache, jnp.zeros(len(tokens), jnp.int32), observe)
    places = contexts[:, None] + jnp.arange(scored)[None, :]
    logits = unembed(params, jnp.take_along_axis(hidden, places[:, :, None], axis=1))
    return Reading(logits, contexts, cache, list(sums), jnp.isfinite(logits).all())


@jax.jit
def read_corpus(params: Params, tokens: Array, observers: list[Observer]) -> tuple[list[list[Sums]], Array]:
    """Sums [] and [F] over all rows of tokens int32 [B, T], per layer and observer; whether activations were finite."""

    def observe(l: int, layer: Layer, seen: MlpPass) -> tuple[list[Sums], Array]:
        sums = [own(l, layer, seen) for own in observers]
        return jax.tree.map(lambda array: array.sum(axis=0), sums), jnp.isfinite(seen.activations).all()

    _, _, sums, finite = read_whole(params, tokens, observe)
    return sums, finite


@jax.jit
def losses(logits: Array, following: Array) -> Array:
    """-log of the probability of tokens `following` [B, T]: float32 [B, T]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, following)


@jax.jit
def with_fixed_sets(
    params: Params,
    reading: Reading,
    rest: Array,
    following: Array,
    kept: list[Array],
    filled: list[Array],
    beside: tuple[tuple[LinearFit, ...], Array] | None,
) -> Differences:
    """The continuation `rest` [B, T] with one set of neurons per row and layer.

    Args:
        params: dense weights.
        reading: of the same texts.
        rest: tokens of the continuation.
        following: the token after each.
        kept: per layer, which neurons are, bool [B, F].
        filled: per layer, what stands for the activations of all others, float32 [B, F].
        beside: per layer, a fit of what is expected of them beside that, and whether it counts, bool [L]; None for
            nothing anywhere.
    """

    def edit(l: int, layer: Layer, seen: MlpPass) -> Array:
        stands = filled[l][:, None, :]
        if beside is not None:
            fits, counts = beside
            stands = stands + jnp.where(counts[l], fits[l].expected(seen.inputs), 0)
        return jnp.where(kept[l][:, None, :], seen.activations, stands.astype(seen.activations.dtype))

    return _differences(params, reading, rest, following, edit)


@partial(jax.jit, static_argnames="magnitude")
def with_best_of_each_token(
    params: Params,
    reading: Reading,
    rest: Array,
    following: Array,
    kept: Array,
    *,
    magnitude: Callable[[Array, Array, Array], Array],
) -> Differences:
    """The continuation with each token's own `kept` [L] neurons, those with the largest `magnitude`.

    What no set that is fixed beforehand can do: a ceiling, and what methods without sets per text compute.

    Args:
        params: dense weights.
        reading: of the same texts.
        rest: tokens of the continuation.
        following: the token after each.
        kept: int32 [L].
        magnitude: (activations, what the activation function gave, both float32 [B, T, F], ||w|| [F]) to [B, T, F].
    """

    def edit(l: int, layer: Layer, seen: MlpPass) -> Array:
        norms = layer.mlp.down.input_norms()
        magnitudes = magnitude(seen.activations.astype(jnp.float32), seen.gated.astype(jnp.float32), norms)
        cut = jnp.sort(magnitudes, axis=-1)[..., magnitudes.shape[-1] - kept[l]][..., None]
        return jnp.where(magnitudes >= cut, seen.activations, 0)

    return _differences(params, reading, rest, following, edit)


def _differences(params: Params, reading: Reading, rest: Array, following: Array, edit: Edit) -> Differences:
    hidden, _, _ = extend(params, rest, reading.cache, reading.contexts, observe_nothing, edit)
    logits = unembed(params, hidden)
    full, narrowed = jax.nn.log_softmax(reading.logits), jax.nn.log_softmax(logits)
    return Differences(
        kl=jnp.sum(jnp.exp(full) * (full - narrowed), axis=-1),
        agreement=(full.argmax(axis=-1) == narrowed.argmax(axis=-1)).astype(jnp.float32),
        loss=losses(logits, following),
    )
