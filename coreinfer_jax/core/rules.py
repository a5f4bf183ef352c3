"""Rules that rank the neurons of a layer by what they did on some tokens: sums over tokens in, scores out.

A rule is two pure functions. `observe` reduces activations [B, T, F] to sums over the counted tokens, float32 [B, F]
each, which add up over the parts of a text and over texts, so that everything streams and a corpus can stand beside a
prompt. `score` turns sums into scores [B, F]; the K neurons with the highest are kept, ties to the lower index. ||w_n||
is the norm of neuron n's column of the down projection: a_n w_n is what the neuron adds to the MLP's output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from coreinfer_jax.config import Budget
from coreinfer_jax.core.select import Votes, Voting, best_first, count_votes
from coreinfer_jax.params import Params

# Float32 [B, F] each, but `tokens` [B], how many were counted, and `total`, the sum of activations: both always there.
Sums: TypeAlias = dict[str, Array]


@dataclass(frozen=True)
class Rule:
    """A way to rank neurons.

    Attributes:
        observe: (activations [B, T, F], voting) to sums; of `voting` some rules only take who is counted.
        score: (sums, ||w|| [F]) to scores [B, F].
        budget: of those that vote, how a token's voices are counted.
    """

    observe: Callable[[Array, Voting], Sums]
    score: Callable[[Sums, Array], Array]
    budget: Budget = "per_token"


def column_norms(params: Params) -> list[Array]:
    """||w_n|| of every layer's neurons: float32 [F] each."""
    return _column_norms([layer.mlp.down.weight for layer in params.layers])


@jax.jit
def _column_norms(weights: list[Array]) -> list[Array]:
    return [jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=0)) for weight in weights]


def with_prior(sums: Sums, prior: Sums, tokens: Array | float) -> Sums:
    """`sums` to which a corpus with the sums `prior` [F] adds those of `tokens` average tokens of its own.

    Among n counted tokens the prompt's weight is n / (n + tokens): it grows with the prompt. (A prior from a corpus
    beside the prompt's own signal: GLASS, arXiv 2508.14302.)
    """
    share = tokens / prior["tokens"]
    added = {name: share * (value if name == "tokens" else value[None, :]) for name, value in prior.items()}
    return {name: own + added[name] for name, own in sums.items()}


def mean_activations(sums: Sums) -> Array:
    """Mean activations over the counted tokens: float32 [B, F]."""
    return sums["total"] / sums["tokens"][:, None]


def places(scores: Array) -> Array:
    """How many neurons come before each in the order of `scores` [B, F], the highest first: int32 [B, F].

    The neurons that a keep ratio keeps are those with a place below K.
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return _inverted(order)


def _inverted(order: Array) -> Array:
    """Where each index stands in permutations `order` int32 [B, F]."""
    index = lax.broadcasted_iota(jnp.int32, order.shape, 1)
    rows = jnp.arange(order.shape[0])[:, None]
    return jnp.zeros(order.shape, jnp.int32).at[rows, order].set(index)


def _common(activations: Array, voting: Voting) -> Sums:
    """The sums every rule has."""
    counted = voting.counted[:, :, None]
    total = jnp.sum(jnp.where(counted, activations, 0), axis=1, dtype=jnp.float32)
    return {"tokens": jnp.sum(voting.counted, axis=1, dtype=jnp.float32), "total": total}


def _over_tokens(activations: Array, voting: Voting, of: Callable[[Array], Array]) -> Sums:
    """The sums every rule has, and as `own` that of `of`(activations as float32), over the counted tokens."""
    wide = jnp.where(voting.counted[:, :, None], activations.astype(jnp.float32), 0)
    return _common(activations, voting) | {"own": of(wide).sum(axis=1)}


def _votes(activations: Array, voting: Voting) -> Sums:
    """The paper's votes."""
    votes = count_votes(activations, voting)
    return _common(activations, voting) | {"total": votes.sums, "own": votes.counts.astype(jnp.float32)}


def _magnitude_votes(activations: Array, voting: Voting) -> Sums:
    """Votes on |a|: all neurons that are not zero compete."""
    votes = count_votes(jnp.abs(activations), voting)
    own = {"magnitudes": votes.sums, "own": votes.counts.astype(jnp.float32)}
    return _common(activations, voting) | own


def _voted(counts: Array, sums: Array) -> Array:
    """Scores [B, F] that order neurons as votes do: by counts, then by sums of activations, then by index."""
    return -_inverted(best_first(Votes(counts, sums))).astype(jnp.float32)


def _shares(activations: Array, voting: Voting) -> Sums:
    """GRIFFIN (arXiv 2404.01365): squared activations, a token's scaled to a sum of 1; one of zeros adds none."""

    def of(wide: Array) -> Array:
        squares = jnp.square(wide)
        whole = squares.sum(axis=-1, keepdims=True)
        return squares / jnp.where(whole > 0, whole, 1)

    return _over_tokens(activations, voting, of)


def _squares(activations: Array, voting: Voting) -> Sums:
    return _over_tokens(activations, voting, jnp.square)


def _variance(sums: Sums) -> Array:
    """Of activations over the counted tokens, float32 [B, F]; rounding may not make it negative."""
    mean = mean_activations(sums)
    return jnp.maximum(sums["own"] / sums["tokens"][:, None] - jnp.square(mean), 0)


def _random(sums: Sums, norms: Array) -> Array:
    return jnp.broadcast_to(jax.random.uniform(jax.random.key(0), norms.shape)[None, :], sums["total"].shape)


RULES: dict[str, Rule] = {
    # The paper's (section 3.2), its authors' budget, and both on magnitudes.
    "votes": Rule(_votes, lambda sums, norms: _voted(sums["own"], sums["total"])),
    "votes-mean-budget": Rule(_votes, lambda sums, norms: _voted(sums["own"], sums["total"]), "mean"),
    "magnitude-votes": Rule(_magnitude_votes, lambda sums, norms: _voted(sums["own"], sums["magnitudes"])),
    # GRIFFIN's, and with the norm of what a neuron writes.
    "griffin": Rule(_shares, lambda sums, norms: sums["own"]),
    "griffin-norm": Rule(_shares, lambda sums, norms: sums["own"] * jnp.square(norms)[None, :]),
    # What dropping a neuron changes in the MLP's output: mean square, or, where its mean stays, variance.
    "energy": Rule(_squares, lambda sums, norms: sums["own"] * jnp.square(norms)[None, :]),
    "variance": Rule(_squares, lambda sums, norms: _variance(sums) * jnp.square(norms)[None, :]),
    # Floors.
    "norm": Rule(_common, lambda sums, norms: jnp.broadcast_to(norms[None, :], sums["total"].shape)),
    "random": Rule(_common, _random),
}
