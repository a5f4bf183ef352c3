"""Votes of texts after their first tokens, many lengths out of one pass, and what sets of neurons share."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from coreinfer_jax.checks import check_finite
from coreinfer_jax.lab.reading import batches, read_whole
from coreinfer_jax.model import Observe
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.measures import membership
from coreinfer_jax.sparsity.votes import (
    Tally,
    Voting,
    all_finite,
    kept_neurons,
    make_voting,
    most_voted,
    token_core_neurons,
)

# A batch's activations [B, T, F] of one layer, several times over, are the largest arrays of a pass.
BATCH_TOKENS = 1024


def text_batches(rows: np.ndarray, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Texts int32 [n, T] in batches of one shape [B, T], and the real rows of each (`batches`)."""
    for chosen, real in batches(len(rows), BATCH_TOKENS // rows.shape[1], name):
        yield rows[chosen], real


def everyone(tokens: np.ndarray, mlp_size: int, alpha: float) -> Voting:
    """Votes of all `tokens` [B, T] by their own budgets, as the paper has it."""
    return make_voting(np.ones(tokens.shape, bool), mlp_size, alpha, "per_token")


def within(marks: Sequence[int], tokens: int) -> Array:
    """Which of T tokens a text of each length in `marks` has: float32 [M, T]."""
    return jnp.asarray((np.arange(tokens)[None, :] < np.asarray(marks)[:, None]).astype(np.float32))


def observe_votes(voting: Voting, lengths: Array) -> Observe[tuple[Tally, Array]]:
    """For `extend`: votes [B, M, F] of as many first tokens as `lengths` (of `within`) says; were all values finite."""
    return lambda l, layer, seen: _votes_within(seen.activations, voting, lengths)


def _votes_within(activations: Array, voting: Voting, lengths: Array) -> tuple[Tally, Array]:
    chosen = token_core_neurons(activations, voting).astype(jnp.float32)
    # In full float32: counts are whole numbers far below 2^24, exact in any order of summation.
    count = partial(jnp.einsum, "bmt,btf->bmf", precision=lax.Precision.HIGHEST)
    rows = jnp.broadcast_to(lengths[None], (activations.shape[0], *lengths.shape))
    votes = Tally(counts=count(rows, chosen).astype(jnp.int32), sums=count(rows, activations.astype(jnp.float32)))
    return votes, all_finite(activations, voting)


def votes_at(params: Params, tokens: np.ndarray, marks: Sequence[int], alpha: float) -> list[Tally]:
    """The votes of every text's first tokens.

    Args:
        params: dense weights.
        tokens: int32 [B, T], without padding.
        marks: numbers of tokens (M of them), each at most T.
        alpha: share of a token's positive neurons it votes for.

    Returns:
        Per layer, `Tally` of int32 and float32 [B, M, F].

    Raises:
        CoreInferError: activations that are NaN or infinite.
    """
    voting = everyone(tokens, params.config.mlp_size, alpha)
    votes, finite = _read(params, jnp.asarray(tokens), voting, within(marks, tokens.shape[1]))
    check_finite(finite, "activations")
    return votes


@jax.jit
def _read(params: Params, tokens: Array, voting: Voting, lengths: Array) -> tuple[list[Tally], Array]:
    _, _, votes, finite = read_whole(params, tokens, observe_votes(voting, lengths))
    return votes, finite


@partial(jax.jit, static_argnames="kept")
def core_masks(votes: Tally, kept: int) -> Array:
    """Which neurons are sentence-wise core neurons: bool [..., F] of votes [..., F]."""
    F = votes.counts.shape[-1]
    chosen = most_voted(votes, kept)
    return membership(chosen.reshape(-1, kept), F).reshape(votes.counts.shape)


@partial(jax.jit, static_argnames="kept")
def shared_between(votes: Tally, pairs: Array, kept: int) -> Array:
    """Share of core neurons that two lengths of a text have in common: float32 [B, P].

    Args:
        votes: of one layer, [B, M, F].
        pairs: int32 [P, 2], positions among the M lengths.
        kept: K.
    """
    masks = core_masks(votes, kept)
    shared = jnp.sum(masks[:, pairs[:, 0]] & masks[:, pairs[:, 1]], axis=-1)
    return shared.astype(jnp.float32) / kept


def overlaps(
    params: Params, rows: np.ndarray, pairs: Sequence[tuple[int, int]], alpha: float, beta: float, name: str
) -> np.ndarray:
    """What the core neurons of a text's first tokens share, for pairs of lengths: float64 [n, P], mean over layers.

    Args:
        params: dense weights.
        rows: int32 [n, T], texts.
        pairs: P pairs of numbers of tokens, each at most T.
        alpha: as in `votes_at`.
        beta: keep ratio.
        name: of the progress bar.
    """
    marks = sorted({mark for pair in pairs for mark in pair})
    places = jnp.asarray([[marks.index(a), marks.index(b)] for a, b in pairs], jnp.int32)
    kept = kept_neurons(beta, params.config.mlp_size)
    found = []
    for tokens, real in text_batches(rows, name):
        layers = [shared_between(votes, places, kept) for votes in votes_at(params, tokens, marks, alpha)]
        found.append(np.mean([np.asarray(layer, np.float64)[:real] for layer in layers], axis=0))
    return np.concatenate(found)


def spread(values: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, median and quartiles over texts, the first axis of `values` [n, ...]."""
    low, median, high = np.percentile(values, [25, 50, 75], axis=0)
    return {"mean": values.mean(axis=0), "median": median, "lower_quartile": low, "upper_quartile": high}
