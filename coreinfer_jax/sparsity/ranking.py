"""From sums over prompts to the neurons that are kept, and what stands for all others."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from coreinfer_jax.model.config import RuleName
from coreinfer_jax.sparsity.measures import membership
from coreinfer_jax.sparsity.rules import RULES, Sums, column_norms_of, mean_activations, with_prior


@partial(jax.jit, static_argnames=("rule", "kept", "compensated"))
def rank(
    sums: list[Sums],
    prior: list[Sums] | None,
    weights: list[Array],
    prior_tokens: Array,
    compensation: Array,
    *,
    rule: RuleName,
    kept: tuple[int, ...],
    compensated: bool,
) -> tuple[list[Array], list[Array | None]]:
    """The K best neurons of each layer, and what is added to the MLP's output for all others.

    Args:
        sums: per layer, over R prompts.
        prior: per layer, over other texts, by the same rule; None for nothing.
        weights: per layer, of the down projection, [D, F].
        prior_tokens: as how many tokens of the prompt the prior counts, [].
        compensation: share of its mean at which a neuron that is not kept stands, [].
        rule: of `sums`.
        kept: per layer, K.
        compensated: whether anything stands for them.

    Returns:
        Per layer, ascending int32 [R, K], and float32 [R, D], or None where nothing stands.
    """
    if prior is not None:
        sums = [with_prior(own, corpus, prior_tokens) for own, corpus in zip(sums, prior, strict=True)]
    indices, offsets = [], []
    for own, weight, K in zip(sums, weights, kept, strict=True):
        scores = RULES[rule].score(own, column_norms_of(weight), compensation)
        indices.append(jnp.sort(jnp.argsort(-scores, axis=-1, stable=True)[:, :K].astype(jnp.int32), axis=-1))
        offsets.append(_offset(own, indices[-1], weight, compensation) if compensated else None)
    return indices, offsets


def _offset(sums: Sums, indices: Array, weight: Array, compensation: Array) -> Array:
    """What neurons other than `indices` [R, K] add to the output at a share of their mean: float32 [R, D]."""
    dropped = ~membership(indices, weight.shape[1])
    standing = jnp.where(dropped, compensation * mean_activations(sums), 0)
    return lax.dot_general(standing, weight.astype(jnp.float32), (((1,), (1,)), ((), ())))
