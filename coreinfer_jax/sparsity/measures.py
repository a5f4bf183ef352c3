"""What votes say of a prompt: its stability figure, its group, its votes fused with those of the group."""

import jax.numpy as jnp
from jax import Array

from coreinfer_jax.sparsity.votes import Tally, most_voted


def stability_figure(early: list[Tally], chosen: list[Array], shards: int = 1) -> Array:
    """How far the first half of a prompt foretells the core neurons of the whole, beyond chance: float32 [R].

    Per layer, the share of the whole prompt's K core neurons that are also those of its early tokens, moved and scaled
    so that 0 is what K of F neurons drawn at random would share and 1 is equality; then the mean over layers. Both
    sets follow the same rule, and both votes come out of one prefill.

    Args:
        early: per layer, [R, F], the votes of the first half of the tokens.
        chosen: per layer, the whole prompt's core neurons, ascending int32 [R, K].
        shards: into how many equal parts the neurons are cut, each of which keeps its own.
    """
    figures = [_beyond_chance(*layer, shards) for layer in zip(early, chosen, strict=True)]
    return jnp.mean(jnp.stack(figures), axis=0)


def _beyond_chance(votes: Tally, chosen: Array, shards: int) -> Array:
    K, F = chosen.shape[-1], votes.counts.shape[-1]
    if K == F:
        return jnp.ones(chosen.shape[0], jnp.float32)
    early = membership(most_voted(votes, K, shards), F)
    shared = jnp.sum(early & membership(chosen, F), axis=-1).astype(jnp.float32) / K
    return (shared - K / F) / (1 - K / F)


def membership(indices: Array, mlp_size: int) -> Array:
    """Binary core-neuron vectors bool [R, F] of index sets [R, K]."""
    rows = jnp.arange(indices.shape[0])[:, None]
    return jnp.zeros((indices.shape[0], mlp_size), bool).at[rows, indices].set(True)


def nearest_group(votes: Tally, kept: int, centroids: Array) -> Array:
    """The group each prompt belongs to: int32 [R].

    Args:
        votes: of the deciding layer, [R, F].
        kept: neurons in a prompt's binary vector.
        centroids: float32 [C, F].
    """
    vectors = membership(most_voted(votes, kept), centroids.shape[-1]).astype(jnp.float32)
    # |x - c|^2 less |x|^2, which is the same for every group.
    distances = jnp.sum(jnp.square(centroids), axis=-1)[None, :] - 2 * vectors @ centroids.T
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def fused(votes: Tally, frequencies: Array, group_tokens: Array) -> Tally:
    """Votes [R, F] to which a group with `frequencies` [R, F] adds those of `group_tokens` average tokens of its own.

    The prompt's weight among n voting tokens is n / (n + group_tokens). (A prior from a corpus beside the prompt's
    own signal: GLASS, arXiv 2508.14302.)
    """
    return Tally(counts=votes.counts.astype(jnp.float32) + group_tokens * frequencies, sums=votes.sums)
