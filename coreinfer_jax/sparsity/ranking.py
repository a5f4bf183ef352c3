"""From sums over prompts to the neurons that are kept, and what stands for all others."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from coreinfer_jax.model.weights import Linear
from coreinfer_jax.sparsity.measures import membership
from coreinfer_jax.sparsity.rules import Rule, Sums, mean_activations, with_prior


@partial(jax.jit, static_argnames=("rule", "kept", "compensated"))
def rank(
    sums: list[Sums],
    prior: list[Sums] | None,
    downs: list[Linear],
    prior_tokens: Array,
    compensation: Array,
    *,
    rule: type[Rule],
    kept: tuple[int, ...],
    compensated: bool,
) -> tuple[list[Array], list[Array | None]]:
    """The K best neurons of each layer, and what is added to the MLP's output for all others.

    Args:
        sums: per layer, over R prompts.
        prior: per layer, over other texts, by the same rule; None for nothing.
        downs: per layer, the down projection of F neurons.
        prior_tokens: as how many tokens of the prompt the prior counts, [].
        compensation: share of its mean at which a neuron that is not kept stands, [].
        rule: of `sums`.
        kept: per layer, K.
        compensated: whether anything stands for them.

    Returns:
        Per layer, ascending int32 [R, K], and float32 [R, D], or None where nothing stands.
    """
    sums, scores = scored(sums, prior, downs, prior_tokens, compensation, rule)
    indices, offsets = [], []
    for own, of_layer, down, K in zip(sums, scores, downs, kept, strict=True):
        indices.append(jnp.sort(jnp.argsort(-of_layer, axis=-1, stable=True)[:, :K].astype(jnp.int32), axis=-1))
        offsets.append(_offset(own, indices[-1], down, compensation) if compensated else None)
    return indices, offsets


def scored(
    sums: list[Sums],
    prior: list[Sums] | None,
    downs: list[Linear],
    prior_tokens: Array,
    compensation: Array,
    rule: type[Rule],
) -> tuple[list[Sums], list[Array]]:
    """Per layer, sums with those of other texts counted in, and scores [R, F] of neurons; arguments as of `rank`."""
    if prior is not None:
        sums = [with_prior(own, corpus, prior_tokens) for own, corpus in zip(sums, prior, strict=True)]
    return sums, [rule.score(own, down.input_norms(), compensation) for own, down in zip(sums, downs, strict=True)]


def _offset(sums: Sums, indices: Array, down: Linear, compensation: Array) -> Array:
    """What neurons other than `indices` [R, K] add to the output at a share of their mean: float32 [R, D]."""
    means = mean_activations(sums)
    dropped = ~membership(indices, means.shape[1])
    return down.mixed(jnp.where(dropped, compensation * means, 0))
