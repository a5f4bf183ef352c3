"""Votes of texts after their first tokens, many lengths out of one pass, and what sets of neurons share."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm import tqdm

from coreinfer_jax.engine.prompts import check_finite
from coreinfer_jax.model import extend
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.measures import membership
from coreinfer_jax.sparsity.votes import (
    Votes,
    Voting,
    all_finite,
    kept_neurons,
    make_voting,
    most_voted,
    token_core_neurons,
)

# A batch's activations [B, T, F] of one layer, several times over, are the largest arrays of a pass.
BATCH_TOKENS = 1024


def batches(rows: np.ndarray, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Texts int32 [n, T] in batches of one shape [B, T], the last filled up with its first row; and the real rows.

    One shape, so that one program serves them all. A progress bar called `name` counts them.
    """
    B = max(1, min(len(rows), BATCH_TOKENS // rows.shape[1]))
    for first in tqdm(range(0, len(rows), B), desc=name, unit="batch", disable=None):
        batch = rows[first : first + B]
        yield np.concatenate([batch, np.repeat(batch[:1], B - len(batch), axis=0)]), len(batch)


def everyone(tokens: np.ndarray, mlp_size: int, alpha: float) -> Voting:
    """Votes of all `tokens` [B, T] by their own budgets, as the paper has it."""
    return make_voting(np.ones(tokens.shape, bool), mlp_size, alpha, "per_token")


def within(marks: Sequence[int], tokens: int) -> Array:
    """Which of T tokens a text of each length in `marks` has: float32 [M, T]."""
    return jnp.asarray((np.arange(tokens)[None, :] < np.asarray(marks)[:, None]).astype(np.float32))


def observed_votes(activations: Array, voting: Voting, lengths: Array) -> tuple[Votes, Array]:
    """Votes [B, M, F] among the first tokens, as many as `lengths` (of `within`) says; whether all were finite.

    For `extend`'s `observe`: activations [B, T, F] of one layer.
    """
    chosen = token_core_neurons(activations, voting).astype(jnp.float32)
    # In full float32: counts are whole numbers far below 2^24, exact in any order of summation.
    count = partial(jnp.einsum, "bmt,btf->bmf", precision=lax.Precision.HIGHEST)
    rows = jnp.broadcast_to(lengths[None], (activations.shape[0], *lengths.shape))
    votes = Votes(counts=count(rows, chosen).astype(jnp.int32), sums=count(rows, activations.astype(jnp.float32)))
    return votes, all_finite(activations, voting)


def votes_at(params: Params, tokens: np.ndarray, marks: Sequence[int], alpha: float) -> list[Votes]:
    """The votes of every text's first tokens.

    Args:
        params: dense weights.
        tokens: int32 [B, T], without padding.
        marks: numbers of tokens (M of them), each at most T.
        alpha: share of a token's positive neurons it votes for.

    Returns:
        Per layer, `Votes` of int32 and float32 [B, M, F].

    Raises:
        CoreInferError: activations that are NaN or infinite.
    """
    voting = everyone(tokens, params.config.mlp_size, alpha)
    votes, finite = _read(params, jnp.asarray(tokens), voting, within(marks, tokens.shape[1]))
    check_finite(finite, "activations")
    return votes


@jax.jit
def _read(params: Params, tokens: Array, voting: Voting, lengths: Array) -> tuple[list[Votes], Array]:
    B, T = tokens.shape
    cache = init_cache(params.config, B, T, params.token_embedding.dtype)
    observe = partial(observed_votes, voting=voting, lengths=lengths)
    _, _, observed = extend(params, tokens, cache, jnp.zeros(B, jnp.int32), observe)
    votes, finite = zip(*observed, strict=True)
    return list(votes), jnp.stack(finite).all()


@partial(jax.jit, static_argnames="kept")
def core_masks(votes: Votes, kept: int) -> Array:
    """Which neurons are sentence-wise core neurons: bool [..., F] of votes [..., F]."""
    F = votes.counts.shape[-1]
    chosen = most_voted(votes, kept)
    return membership(chosen.reshape(-1, kept), F).reshape(votes.counts.shape)


@partial(jax.jit, static_argnames="kept")
def shared_between(votes: Votes, pairs: Array, kept: int) -> Array:
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
    for tokens, real in batches(rows, name):
        layers = [shared_between(votes, places, kept) for votes in votes_at(params, tokens, marks, alpha)]
        found.append(np.mean([np.asarray(layer, np.float64)[:real] for layer in layers], axis=0))
    return np.concatenate(found)


def spread(values: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, median and quartiles over texts, the first axis of `values` [n, ...]."""
    low, median, high = np.percentile(values, [25, 50, 75], axis=0)
    return {"mean": values.mean(axis=0), "median": median, "lower_quartile": low, "upper_quartile": high}
