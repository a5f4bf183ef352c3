"""From sums over prompts to the neurons that are kept, and what stands for all others."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from coreinfer_jax.model.shards import WHOLE, along, over_shards, shard_here, shards_of, specs, total
from coreinfer_jax.model.weights import Linear
from coreinfer_jax.sparsity.measures import membership
from coreinfer_jax.sparsity.rules import Rule, Summed, Sums, mean_activations, with_prior
from coreinfer_jax.sparsity.votes import best_of_shards


@partial(jax.jit, static_argnames=("rule", "kept", "compensated", "shards", "mesh"))
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
    shards: int = 1,
    mesh: Mesh | None = None,
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
        shards: into how many equal parts the neurons are cut (n), each of which keeps K / n.
        mesh: of devices that neurons are spread over, n of them.

    Returns:
        Per layer, ascending int32 [R, K], and float32 [R, D], or None where nothing stands.
    """
    if not sums:
        return [], []
    here = shards // shards_of(mesh)
    run = over_shards(
        partial(_ranked, rule=rule, kept=tuple(K // shards * here for K in kept), compensated=compensated, shards=here),
        mesh,
        results=([along(1, 2)] * len(sums), [WHOLE if compensated or own is not None else None for own in constants]),
        arguments=(
            specs(Summed(sums)),
            jax.tree.map(lambda array: along(0, 1) if array.ndim else WHOLE, prior),
            [down.by_inputs() for down in downs],
            [None if own is None else along(0, 1) for own in constants],
            WHOLE,
            WHOLE,
        ),
    )
    return run(Summed(sums), prior, downs, constants, prior_tokens, compensation)


def _ranked(
    summed: Summed,
    prior: list[Sums] | None,
    downs: list[Linear],
    constants: list[Array | None],
    prior_tokens: Array,
    compensation: Array,
    *,
    rule: type[Rule],
    kept: tuple[int, ...],
    compensated: bool,
    shards: int,
) -> tuple[list[Array], list[Array | None]]:
    sums = _with_priors(summed.sums, prior, prior_tokens)
    norms = [down.input_norms() for down in downs]
    # Beside linear neurons a prompt's own means gained nothing: 0.3 % of the KL divergence on SmolLM2-135M.
    shares = [compensation if constant is None else jnp.zeros_like(compensation) for constant in constants]
    indices, dropped = lax.platform_dependent(
        sums,
        norms,
        shares,
        cpu=partial(_each_alone, rule=rule, kept=kept, shards=shards),
        default=partial(_all_at_once, rule=rule, kept=kept, shards=shards),
    )
    numbers = [own + shard_here() * len(of_layer) for own, of_layer in zip(indices, norms, strict=True)]
    offsets = [
        _written(down, gone, share * mean_activations(own) if constant is None else constant[None])
        if compensated or constant is not None
        else None
        for own, gone, down, constant, share in zip(sums, dropped, downs, constants, shares, strict=True)
    ]
    return numbers, offsets


@partial(jax.jit, static_argnames="mesh")
def stand_ins(
    indices: list[Array], downs: list[Linear], constants: list[Array], *, mesh: Mesh | None = None
) -> list[Array]:
    """What neurons outside of given sets write where each stands at its constant: per layer, float32 [R, D].

    Args:
        indices: per layer, ascending int32 [R, K]; on a mesh, of each device as many, one device's behind another's.
        downs: per layer, the down projection of F neurons.
        constants: per layer, [F].
        mesh: of devices that neurons are spread over.
    """
    run = over_shards(
        _stand_ins,
        mesh,
        results=[WHOLE] * len(downs),
        arguments=([along(1, 2)] * len(downs), [down.by_inputs() for down in downs], [along(0, 1)] * len(downs)),
    )
    return run(indices, downs, constants)


def _stand_ins(indices: list[Array], downs: list[Linear], constants: list[Array]) -> list[Array]:
    sizes = [len(constant) for constant in constants]
    kept = [membership(own - shard_here() * size, size) for own, size in zip(indices, sizes, strict=True)]
    return [_written(down, ~own, constant[None]) for own, down, constant in zip(kept, downs, constants, strict=True)]


def _written(down: Linear, gone: Array, values: Array) -> Array:
    """What neurons that are `gone`, bool [R, F], write where they stand at `values`, [R, F] or [1, F]: [R, D]."""
    return total(down.mixed(jnp.where(gone, values, 0)))


# A sort is one program on a CPU, which runs those of several layers side by side: 32 layers of 14336 neurons take 92 ms
# on two cores, all at once 123. On a GPU it is a dozen small programs and as many waits, for one layer or for all.
def _each_alone(
    sums: list[Sums], norms: list[Array], shares: list[Array], *, rule: type[Rule], kept: tuple[int, ...], shards: int
) -> tuple[list[Array], list[Array]]:
    """Per layer, the K best neurons, ascending int32 [R, K], and which are not among them, bool [R, F]."""
    indices = []
    for own, of_layer, share, K in zip(sums, norms, shares, kept, strict=True):
        scores = rule.score(own, of_layer, share)
        indices.append(best_of_shards(partial(_highest, kept=K // shards), scores, shards))
    return indices, [~membership(best, len(of_layer)) for best, of_layer in zip(indices, norms, strict=True)]


def _highest(scores: Array, kept: int) -> Array:
    """Ascending int32 [..., K] numbers of the highest of scores [..., F], ties to the lower."""
    return jnp.sort(jnp.argsort(-scores, axis=-1, stable=True)[..., :kept].astype(jnp.int32), axis=-1)


def _all_at_once(
    sums: list[Sums], norms: list[Array], shares: list[Array], *, rule: type[Rule], kept: tuple[int, ...], shards: int
) -> tuple[list[Array], list[Array]]:
    """`_each_alone` over arrays of all layers."""
    stacked: Sums = jax.tree.map(lambda *layers: jnp.stack(layers), *sums)
    scores = jax.vmap(rule.score)(stacked, jnp.stack(norms), jnp.stack(shares))
    # The parts of a shard are as further rows.
    parts = scores.reshape(len(kept), -1, scores.shape[-1] // shards)
    own = [K // shards for K in kept]
    most, size = max(own), parts.shape[-1]
    best = jnp.argsort(-parts, axis=-1, stable=True)[:, :, :most].astype(jnp.int32)
    # F / n, which is no neuron, stands where a layer keeps fewer than another: last in order, and outside of the mask.
    best = jnp.where(jnp.arange(most)[None, None, :] < jnp.array(own)[:, None, None], best, size)
    ascending = jnp.sort(best, axis=-1)
    dropped = ~membership(ascending.reshape(-1, most), size).reshape(scores.shape)
    first = (size * jnp.arange(parts.shape[1], dtype=jnp.int32) % scores.shape[-1])[:, None]
    numbers = [(first + layer[:, :K]).reshape(-1, K * shards) for layer, K in zip(ascending, own, strict=True)]
    return numbers, list(dropped)


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
