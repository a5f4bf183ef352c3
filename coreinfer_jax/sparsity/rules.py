"""Rules that rank the neurons of a layer by what they did on some tokens: sums over tokens in, scores out.

A rule is two pure functions. `observe` reduces activations [B, T, F] to sums over the counted tokens, float32 [B] or
[B, F] each, which add up over the parts of a text and over texts, so that everything streams and a corpus can stand
beside a prompt. `score` turns sums into scores [B, F]; the K highest are kept, ties to the lower index.
||w_n|| is the norm of neuron n's column of the down projection: a_n w_n is what the neuron adds to the MLP's output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from coreinfer_jax.model.config import Budget
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.votes import Votes, Voting, best_first, count_votes

# Always there: `tokens` [B], how many were counted; `weight` [B], the sum of their weights; `total` [B, F], the
# weighted sum of activations. A rule adds its own, [B, F].
Sums: TypeAlias = dict[str, Array]


@dataclass(frozen=True)
class Rule:
    """A way to rank neurons.

    Attributes:
        observe: (activations [B, T, F], ||w|| [F], voting) to sums; of `voting` some rules only take who is counted.
        score: (sums, ||w|| [F], compensation []) to scores [B, F]; `compensation` is the share of its mean activation
            that stands for a neuron which is not kept.
        budget: of those that vote, how a token's voices are counted.
    """

    observe: Callable[[Array, Array, Voting], Sums]
    score: Callable[[Sums, Array, Array], Array]
    budget: Budget = "per_token"


def column_norms(params: Params) -> list[Array]:
    """||w_n|| of every layer's neurons: float32 [F] each."""
    return _column_norms([layer.mlp.down.weight for layer in params.layers])


@jax.jit
def _column_norms(weights: list[Array]) -> list[Array]:
    return [column_norms_of(weight) for weight in weights]


def column_norms_of(weight: Array) -> Array:
    """||w_n|| of the neurons of one down projection [D, F]: float32 [F]."""
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=0))


def with_prior(sums: Sums, prior: Sums, tokens: Array | float) -> Sums:
    """`sums` to which a corpus with the sums `prior` adds those of `tokens` average tokens of its own.

    Among n counted tokens the prompt's weight is n / (n + tokens): it grows with the prompt. (A prior from a corpus
    beside the prompt's own signal: GLASS, arXiv 2508.14302.)

    Args:
        sums: of prompts, [B] and [B, F].
        prior: of the corpus, [] and [F].
        tokens: of the corpus that count.
    """
    share = tokens / prior["tokens"]
    return {name: own + (share * prior[name])[None] for name, own in sums.items()}


def mean_activations(sums: Sums) -> Array:
    """Mean activations over the counted tokens, by their weights: float32 [B, F]; 0 where no token has any weight."""
    weight = sums["weight"]
    return sums["total"] / jnp.where(weight > 0, weight, 1)[:, None]


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


def _common(activations: Array, norms: Array, voting: Voting) -> Sums:
    """The sums every rule has, all tokens of equal weight."""
    tokens = jnp.sum(voting.counted, axis=1, dtype=jnp.float32)
    total = jnp.sum(jnp.where(voting.counted[:, :, None], activations, 0), axis=1, dtype=jnp.float32)
    return {"tokens": tokens, "weight": tokens, "total": total}


def _votes(activations: Array, norms: Array, voting: Voting) -> Sums:
    """The paper's votes; where early tokens also count apart, theirs as well."""
    votes = count_votes(activations, voting)
    own = {"total": votes.sums, "votes": votes.counts.astype(jnp.float32)}
    if votes.early is not None:
        own |= {"early_total": votes.early.sums, "early_votes": votes.early.counts.astype(jnp.float32)}
    return _common(activations, norms, voting) | own


def votes_of(sums: Sums) -> Votes:
    """The votes in the sums of the rule `votes`."""
    early = Votes(sums["early_votes"], sums["early_total"]) if "early_votes" in sums else None
    return Votes(sums["votes"], sums["total"], early)


def _voted(sums: Sums, norms: Array, compensation: Array) -> Array:
    """Scores that order neurons as votes do: by counts, then by sums of activations, then by index."""
    return -_inverted(best_first(votes_of(sums))).astype(jnp.float32)


def _magnitude_votes(activations: Array, norms: Array, voting: Voting) -> Sums:
    """Votes on |a|: all neurons that are not zero compete."""
    votes = count_votes(jnp.abs(activations), voting)
    own = {"magnitudes": votes.sums, "votes": votes.counts.astype(jnp.float32)}
    return _common(activations, norms, voting) | own


def _voted_by_magnitude(sums: Sums, norms: Array, compensation: Array) -> Array:
    return _voted(sums | {"total": sums["magnitudes"]}, norms, compensation)


def _moments(activations: Array, norms: Array, voting: Voting, *, scale: Callable[[Array, Array], Array]) -> Sums:
    """Weighted sums of activations and of their squares: a token's weight makes its `scale` 1, one of zeros has none.

    Args:
        activations: [B, T, F].
        norms: ||w||, [F].
        voting: who is counted.
        scale: (activations float32 [B, T, F], norms) to [B, T].
    """
    wide = jnp.where(voting.counted[:, :, None], activations.astype(jnp.float32), 0)
    scales = scale(wide, norms)
    weights = jnp.where(voting.counted & (scales > 0), 1 / jnp.where(scales > 0, scales, 1), 0)
    return {
        "tokens": jnp.sum(voting.counted, axis=1, dtype=jnp.float32),
        "weight": weights.sum(axis=1),
        "total": jnp.sum(weights[:, :, None] * wide, axis=1),
        "squares": jnp.sum(weights[:, :, None] * jnp.square(wide), axis=1),
    }


def _unscaled(wide: Array, norms: Array) -> Array:
    return jnp.ones(wide.shape[:2], jnp.float32)


def _squared_norm(wide: Array, norms: Array) -> Array:
    return jnp.sum(jnp.square(wide), axis=-1)


def _written(wide: Array, norms: Array) -> Array:
    """Sum over neurons of the squared norms of what they add to the output."""
    return jnp.sum(jnp.square(wide * norms[None, None, :]), axis=-1)


def _spread(sums: Sums, norms: Array, compensation: Array) -> Array:
    """Weighted sum of squares of a_n - compensation * mean a_n: what is lost of a_n when it is dropped."""
    # Expanded: squares - 2 c total + c^2 weight, with c = compensation * total / weight.
    counted_twice = compensation * (2 - compensation)
    return sums["squares"] - counted_twice * mean_activations(sums) * sums["total"]


def _spread_written(sums: Sums, norms: Array, compensation: Array) -> Array:
    """`_spread` of a_n ||w_n||: what dropping the neuron changes in the output."""
    return _spread(sums, norms, compensation) * jnp.square(norms)[None, :]


def _by_norm(sums: Sums, norms: Array, compensation: Array) -> Array:
    return jnp.broadcast_to(norms[None, :], sums["total"].shape)


def _random(sums: Sums, norms: Array, compensation: Array) -> Array:
    return jnp.broadcast_to(jax.random.uniform(jax.random.key(0), norms.shape)[None, :], sums["total"].shape)


RULES: dict[str, Rule] = {
    # What a neuron adds to the output, as a share of what its token's neurons add.
    "contribution": Rule(partial(_moments, scale=_written), _spread_written),
    # The paper's (section 3.2), its authors' budget, and both on magnitudes.
    "votes": Rule(_votes, _voted),
    "votes-mean-budget": Rule(_votes, _voted, "mean"),
    "magnitude-votes": Rule(_magnitude_votes, _voted_by_magnitude),
    # GRIFFIN's (arXiv 2404.01365), and with the norm of what a neuron writes.
    "griffin": Rule(partial(_moments, scale=_squared_norm), _spread),
    "griffin-norm": Rule(partial(_moments, scale=_squared_norm), _spread_written),
    # Mean square of what a neuron adds to the output, all tokens alike.
    "energy": Rule(partial(_moments, scale=_unscaled), _spread_written),
    # Floors.
    "norm": Rule(_common, _by_norm),
    "random": Rule(_common, _random),
}
