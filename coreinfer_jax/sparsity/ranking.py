"""From sums over prompts to the neurons that are kept, and what stands for all others."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from coreinfer_jax.model.weights import Linear
from coreinfer_jax.sparsity.measures import membership
from coreinfer_jax.sparsity.rules import Rule, Sums, mean_activations, with_prior


@partial(jax.jit, static_argnames=("rule", "kept", "compensated"))
def rank(
    sums: list[Sums],
    prior: list[Sums] | None,
    downs: list[Linear],
    constants: list[Array | None],
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
        constants: per layer [F], where linear neurons have each neuron stand that is not kept; None for layers without.
        prior_tokens: as how many tokens of the prompt the prior counts, [].
        compensation: share of its mean at which a neuron that is not kept stands in layers without linear neurons, [].
        rule: of `sums`.
        kept: per layer, K.
        compensated: whether anything stands for them.

    Returns:
        Per layer, ascending int32 [R, K], and float32 [R, D], or None where nothing stands.
    """
    if not sums:
        return [], []
    sums = _with_priors(sums, prior, prior_tokens)
    norms = [down.input_norms() for down in downs]
    # Beside linear neurons a prompt's own means gained nothing: 0.3 % of the KL divergence on SmolLM2-135M.
    shares = [compensation if constant is None else jnp.zeros_like(compensation) for constant in constants]
    indices, dropped = lax.platform_dependent(
        sums,
        norms,
        shares,
        cpu=partial(_each_alone, rule=rule, kept=kept),
        default=partial(_all_at_once, rule=rule, kept=kept),
    )
    offsets = [
        down.mixed(jnp.where(gone, share * mean_activations(own) if constant is None else constant[None], 0))
        if compensated or constant is not None
        else None
        for own, gone, down, constant, share in zip(sums, dropped, downs, constants, shares, strict=True)
    ]
    return indices, offsets


# A sort is one program on a CPU, which runs those of several layers side by side: 32 layers of 14336 neurons take 92 ms
# on two cores, all at once 123. On a GPU it is a dozen small programs and as many waits, for one layer or for all.
def _each_alone(
    sums: list[Sums], norms: list[Array], shares: list[Array], *, rule: type[Rule], kept: tuple[int, ...]
) -> tuple[list[Array], list[Array]]:
    """Per layer, the K best neurons, ascending int32 [R, K], and which are not among them, bool [R, F]."""
    indices = []
    for own, of_layer, share, K in zip(sums, norms, shares, kept, strict=True):
        scores = rule.score(own, of_layer, share)
        indices.append(jnp.sort(jnp.argsort(-scores, axis=-1, stable=True)[:, :K].astype(jnp.int32), axis=-1))
    return indices, [~membership(best, len(of_layer)) for best, of_layer in zip(indices, norms, strict=True)]


def _all_at_once(
    sums: list[Sums], norms: list[Array], shares: list[Array], *, rule: type[Rule], kept: tuple[int, ...]
) -> tuple[list[Array], list[Array]]:
    """`_each_alone` over arrays of all layers."""
    stacked: Sums = jax.tree.map(lambda *layers: jnp.stack(layers), *sums)
    scores = jax.vmap(rule.score)(stacked, jnp.stack(norms), jnp.stack(shares))
    most, F = max(kept), scores.shape[-1]
    best = jnp.argsort(-scores, axis=-1, stable=True)[:, :, :most].astype(jnp.int32)
    # F, which is no neuron, stands where a layer keeps fewer than another: last in order, and outside of the mask.
    best = jnp.where(jnp.arange(most)[None, None, :] < jnp.array(kept)[:, None, None], best, F)
    ascending = jnp.sort(best, axis=-1)
    dropped = ~membership(ascending.reshape(-1, most), F).reshape(scores.shape)
    return [layer[:, :K] for layer, K in zip(ascending, kept, strict=True)], list(dropped)


def scored(
    sums: list[Sums],
    prior: list[Sums] | None,
    downs: list[Linear],
    prior_tokens: Array,
    compensation: Array,
    rule: type[Rule],
) -> tuple[list[Sums], list[Array]]:
    """Per layer, sums with those of other texts counted in, and scores [R, F] of neurons; arguments as of `rank`."""
    sums = _with_priors(sums, prior, prior_tokens)
    return sums, [rule.score(own, down.input_norms(), compensation) for own, down in zip(sums, downs, strict=True)]


def _with_priors(sums: list[Sums], prior: list[Sums] | None, prior_tokens: Array) -> list[Sums]:
    if prior is None:
        return sums
    return [with_prior(own, corpus, prior_tokens) for own, corpus in zip(sums, prior, strict=True)]
