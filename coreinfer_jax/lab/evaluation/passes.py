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

from coreinfer_jax.model import Edit, extend, observe_nothing, unembed
from coreinfer_jax.model.cache import KVCache, init_cache
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.rules import RULES, Sums
from coreinfer_jax.sparsity.votes import Voting


@struct.dataclass
class Reading:
    """What the full model made of texts.

    Attributes:
        logits: float32 [B, T, V], of the T positions of the continuation.
        cache: keys and values of the context, and beyond it the full model's, which a later pass overwrites.
        context: per layer and rule, sums over the context.
        continuation: likewise over the continuation.
        finite: bool [], whether all logits were finite.
    """

    logits: Array
    cache: KVCache
    context: list[dict[str, Sums]]
    continuation: list[dict[str, Sums]]
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


@partial(jax.jit, static_argnames=("context", "rules"))
def read(
    params: Params,
    tokens: Array,
    norms: list[Array],
    votings: dict[str, tuple[Voting, Voting]],
    *,
    context: int,
    rules: tuple[str, ...],
) -> Reading:
    """The full model over tokens int32 [B, context + T].

    Args:
        params: dense weights.
        tokens: without padding.
        norms: `column_norms`.
        votings: by budget, who votes with how many voices in the context, and in the continuation.
        context: tokens of it.
        rules: whose sums are wanted.
    """
    B, size = tokens.shape
    remaining = iter(norms)  # the decoder's layers are traced in order

    def observe(activations: Array) -> tuple[dict[str, Sums], dict[str, Sums]]:
        first, second = ({budget: own[part] for budget, own in votings.items()} for part in (0, 1))
        norm = next(remaining)
        return _sums(activations[:, :context], norm, first, rules), _sums(activations[:, context:], norm, second, rules)

    cache = init_cache(params.config, B, size, params.token_embedding.dtype)
    hidden, cache, observed = extend(params, tokens, cache, jnp.zeros(B, jnp.int32), observe)
    logits = unembed(params, hidden[:, context:])
    first, rest = zip(*observed, strict=True)
    return Reading(logits, cache, list(first), list(rest), jnp.isfinite(logits).all())


@partial(jax.jit, static_argnames="rules")
def read_corpus(
    params: Params, tokens: Array, norms: list[Array], votings: dict[str, Voting], *, rules: tuple[str, ...]
) -> tuple[list[dict[str, Sums]], Array]:
    """Sums [] and [F] over all rows of tokens int32 [B, T], per layer and rule; whether activations were finite."""
    remaining = iter(norms)
    cache = init_cache(params.config, *tokens.shape, params.token_embedding.dtype)

    def observe(activations: Array) -> tuple[dict[str, Sums], Array]:
        sums = jax.tree.map(lambda array: array.sum(axis=0), _sums(activations, next(remaining), votings, rules))
        return sums, jnp.isfinite(activations).all()

    _, _, observed = extend(params, tokens, cache, jnp.zeros(tokens.shape[0], jnp.int32), observe)
    sums, finite = zip(*observed, strict=True)
    return list(sums), jnp.stack(finite).all()


def _sums(activations: Array, norms: Array, votings: dict[str, Voting], rules: tuple[str, ...]) -> dict[str, Sums]:
    return {name: RULES[name].observe(activations, norms, votings[RULES[name].budget]) for name in rules}


@jax.jit
def losses(logits: Array, following: Array) -> Array:
    """-log of the probability of tokens `following` [B, T]: float32 [B, T]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, following)


@jax.jit
def with_fixed_sets(
    params: Params, reading: Reading, rest: Array, following: Array, kept: list[Array], filled: list[Array]
) -> Differences:
    """The continuation `rest` [B, T] with one set of neurons per row and layer.

    Args:
        params: dense weights.
        reading: of the same texts.
        rest: tokens of the continuation.
        following: the token after each.
        kept: per layer, which neurons are, bool [B, F].
        filled: per layer, what stands for the activations of all others, float32 [B, F].
    """
    remaining = iter(zip(kept, filled, strict=True))

    def edit(activations: Array, gated: Array) -> Array:
        mask, fill = next(remaining)  # the decoder's layers are traced in order
        return jnp.where(mask[:, None, :], activations, fill[:, None, :].astype(activations.dtype))

    return _differences(params, reading, rest, following, edit)


@partial(jax.jit, static_argnames="magnitude")
def with_best_of_each_token(
    params: Params,
    reading: Reading,
    rest: Array,
    following: Array,
    norms: list[Array],
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
        norms: `column_norms`.
        kept: int32 [L].
        magnitude: (activations, what the activation function gave, both float32 [B, T, F], ||w|| [F]) to [B, T, F].
    """
    remaining = iter(zip(norms, kept, strict=True))

    def edit(activations: Array, gated: Array) -> Array:
        norm, most = next(remaining)
        magnitudes = magnitude(activations.astype(jnp.float32), gated.astype(jnp.float32), norm)
        cut = jnp.sort(magnitudes, axis=-1)[..., magnitudes.shape[-1] - most][..., None]
        return jnp.where(magnitudes >= cut, activations, 0)

    return _differences(params, reading, rest, following, edit)


def _differences(params: Params, reading: Reading, rest: Array, following: Array, edit: Edit) -> Differences:
    B, T = rest.shape
    context = reading.cache.keys[0].shape[2] - T
    start = jnp.full(B, context, jnp.int32)
    hidden, _, _ = extend(params, rest, reading.cache, start, observe_nothing, edit)
    logits = unembed(params, hidden)
    full, narrowed = jax.nn.log_softmax(reading.logits), jax.nn.log_softmax(logits)
    return Differences(
        kl=jnp.sum(jnp.exp(full) * (full - narrowed), axis=-1),
        agreement=(full.argmax(axis=-1) == narrowed.argmax(axis=-1)).astype(jnp.float32),
        loss=losses(logits, following),
    )
