"""From MLP activations to core neurons (paper, section 3.2): budgets, votes, the K neurons with the most votes.

Everything streams: votes are counted layer by layer inside the prefill, from one layer's activations [B, T, F].
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import floor
from typing import Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from coreinfer_jax.checks import check_fraction, check_name
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.shards import shard_here, shards_here, total

Budget = Literal["per_token", "mean"]
BUDGETS: tuple[Budget, ...] = get_args(Budget)

# float32 error that must not cost a token a neuron under the `mean` rule: alpha * mean is evaluated to about 3e-7, so
# a product that truly lies less than this below a whole number counts as that number.
MEAN_TOLERANCE = 1e-6
# The activations of a row's block stay in a processor's cache while the bits of its cuts are found.
TOKENS_PER_BLOCK = 64
# Bits of a token's cut that one pass over its neurons finds on an accelerator, which waits for memory: 7 counts each.
# On a CPU, which waits for the counts, it is one bit and one count.
ACCELERATOR_BITS = 3


@struct.dataclass
class Voting:
    """Who votes, and with how many voices. Data of a compiled prefill, so a new alpha compiles nothing.

    Attributes:
        counted: bool [B, T]; False for padding and for a BOS token that is to be left out.
        budgets: int32 [F + 1]; floor(alpha * c) for c positive neurons, evaluated in float64.
        remainders: float32 [F + 1]; what that floor dropped.
        alpha: float32 [].
        budget: `per_token` or `mean`; part of the program.
    """

    counted: Array
    budgets: Array
    remainders: Array
    alpha: Array
    budget: Budget = struct.field(pytree_node=False)

    @property
    def adds_up(self) -> bool:
        """Whether the votes of pieces add up to those of all tokens: a mean budget asks for all tokens at once."""
        return self.budget == "per_token"

    def piece(self, start: Array, size: int) -> "Voting":
        """The votes of the tokens start .. start + size - 1 alone."""
        return replace(self, counted=some_tokens(self.counted, start, size))


def some_tokens(mask: Array, start: Array, size: int) -> Array:
    """Tokens start .. start + size - 1 of `mask` [B, T]: [B, `size`]."""
    return lax.dynamic_slice_in_dim(mask, start, size, axis=1)


@struct.dataclass
class Tally:
    """What a layer's tokens voted.

    Attributes:
        counts: int32 [B, F], or float32 where votes are weighed.
        sums: float32 [B, F] of activations, to break ties.
    """

    counts: Array
    sums: Array


def make_voting(counted: np.ndarray, mlp_size: int, alpha: float, budget: Budget) -> Voting:
    """The `Voting` of tokens `counted` bool [B, T] in a model with `mlp_size` (F) neurons per layer."""
    shares = alpha * np.arange(mlp_size + 1, dtype=np.float64)
    floors = np.floor(shares)
    return Voting(
        counted=jnp.asarray(counted),
        budgets=jnp.asarray(floors.astype(np.int32)),
        remainders=jnp.asarray((shares - floors).astype(np.float32)),
        alpha=jnp.asarray(np.float32(alpha)),
        budget=budget,
    )


def count_votes(activations: Array, voting: Voting) -> Tally:
    """Votes f(n) of activations [B, T, F]: in how many counted tokens neuron n is a token-wise core neuron."""
    return count_each(activations, voting, (voting.counted,))[0]


@jax.named_scope("votes")
def count_each(activations: Array, voting: Voting, parts: tuple[Array, ...]) -> tuple[Tally, ...]:
    """Votes of activations [B, T, F], apart for each of `parts`: bool [B, T], some of the counted tokens."""
    budgets = _budgets(activations, voting)
    # A CPU counts in its cache, block by block; an accelerator would start as many programs per block as for all.
    at_once = partial(_count_block, bits=ACCELERATOR_BITS)
    return lax.platform_dependent(activations, budgets, parts, cpu=_count_by_blocks, default=at_once)


def token_core_neurons(activations: Array, voting: Voting) -> Array:
    """The token-wise core neurons of activations [B, T, F]: bool [B, T, F], those of uncounted tokens included."""
    return _chosen(activations, _budgets(activations, voting), bits=1)


def _budgets(activations: Array, voting: Voting) -> Array:
    """How many neurons each token of activations [B, T, F] votes for, int32 [B, T]: never more than are positive."""
    positives = _count(_positive_patterns(activations) > 0)
    budgets = voting.budgets[positives] if voting.budget == "per_token" else _mean_budgets(positives, voting)
    return jnp.minimum(budgets, positives)


def _chosen(activations: Array, budgets: Array, bits: int) -> Array:
    """Mask [B, T, F] of the `budgets` [B, T] largest positive activations of each token."""
    return _largest(_positive_patterns(activations), budgets, _unused_bits(activations.dtype), bits)


def _count_by_blocks(activations: Array, budgets: Array, parts: tuple[Array, ...]) -> tuple[Tally, ...]:
    """Votes of activations [B, T, F] with `budgets` [B, T], one block of tokens after the other."""

    def votes_of(start: Array | int, size: int) -> tuple[Tally, ...]:
        def cut(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, start, size, axis=1)

        return _count_block(cut(activations), cut(budgets), tuple(map(cut, parts)), bits=1)

    tokens = activations.shape[1]
    size = min(tokens, TOKENS_PER_BLOCK)
    blocks, rest = divmod(tokens, size)
    # One block or what is left over comes first; padded prompts leave nothing over.
    start = blocks - (0 if rest else 1)
    first = votes_of(start * size, rest or size)

    def add(i: Array, votes: tuple[Tally, ...]) -> tuple[Tally, ...]:
        return jax.tree.map(jnp.add, votes, votes_of(i * size, size))

    return lax.fori_loop(0, start, add, first)


def _count_block(activations: Array, budgets: Array, parts: tuple[Array, ...], bits: int) -> tuple[Tally, ...]:
    """Votes of activations [B, T, F] with `budgets` [B, T], all tokens at once."""
    chosen = _chosen(activations, budgets, bits)
    return tuple(_tally(chosen, activations, part) for part in parts)


def _tally(chosen: Array, activations: Array, counted: Array) -> Tally:
    """The votes of tokens `counted` [B, T] for their token-wise core neurons `chosen` [B, T, F]."""
    mask = counted[:, :, None]
    return Tally(
        counts=jnp.sum(chosen & mask, axis=1, dtype=jnp.int32),
        sums=jnp.sum(jnp.where(mask, activations, 0), axis=1, dtype=jnp.float32),
    )


def all_finite(activations: Array, voting: Voting) -> Array:
    """Whether the activations [B, T, F] of all counted tokens are finite: bool []."""
    return (jnp.isfinite(activations) | ~voting.counted[:, :, None]).all()


def _count(mask: Array) -> Array:
    """How many neurons of all devices a mask [B, T, F] holds, int32 [B, T]."""
    return total(jnp.sum(mask, axis=-1, dtype=jnp.int32))


def _mean_budgets(positives: Array, voting: Voting) -> Array:
    """floor(alpha * mean of the counted tokens' positives) for every token: [B, 1] from [B, T].

    The mean q + r / n is split into a whole number, whose share is tabled in float64, and a fraction.
    """
    tokens = jnp.maximum(jnp.sum(voting.counted, axis=-1, dtype=jnp.int32), 1).astype(jnp.uint32)
    total = jnp.sum(jnp.where(voting.counted, positives, 0), axis=-1, dtype=jnp.uint32)
    whole, rest = total // tokens, total % tokens
    fraction = rest.astype(jnp.float32) / tokens.astype(jnp.float32)
    carried = jnp.floor(voting.remainders[whole] + voting.alpha * fraction + MEAN_TOLERANCE).astype(jnp.int32)
    return (voting.budgets[whole] + jnp.where(rest == 0, 0, carried))[:, None]


def _positive_patterns(activations: Array) -> Array:
    """Bits of each positive activation as int32, which ascend with its value; 0 for all others.

    Compared as bits because XLA's CPU code takes numbers below 1e-38 for zero.
    """
    bits = lax.bitcast_convert_type(activations.astype(jnp.float32), jnp.int32)
    return jnp.maximum(bits, 0)


def _unused_bits(dtype: jnp.dtype) -> int:
    """Low bits of a float32 that are zero in every value of a 16-bit `dtype`."""
    return int(jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant)


def _largest(patterns: Array, budgets: Array, unused_bits: int, bits: int) -> Array:
    """Mask [B, T, F] of each token's `budgets` [B, T] largest `patterns`, ties to the lower index.

    The cut is found by bisection instead of sorting: the value at the cut is built from the top, `bits` of its bits by
    one pass over F; the index up to which neurons equal to it still fit is found the same way.
    """

    def reaches(cut: Array) -> Array:
        return _count(patterns >= cut[:, :, None]) >= budgets

    cut = _largest_passing(budgets.shape, 30, unused_bits, bits, reaches)
    above, level = patterns > cut[:, :, None], patterns == cut[:, :, None]
    fitting = budgets - _count(above)
    here = patterns.shape[-1]
    size = here * shards_here()
    index = lax.broadcasted_iota(jnp.int32, patterns.shape, 2) + shard_here() * here

    def fits(end: Array) -> Array:
        return _count(level & (index < end[:, :, None])) <= fitting

    def search() -> Array:
        return _largest_passing(budgets.shape, size.bit_length() - 1, 0, bits, fits)

    def all_of_them() -> Array:
        return jnp.full(budgets.shape, size, jnp.int32)

    # Few float32 values are equal, so that mostly all of those at the cut fit. To know it an accelerator would have to
    # wait in every layer.
    end = search() if bits > 1 else lax.cond((_count(level) > fitting).any(), search, all_of_them)
    return above | (level & (index < end[:, :, None]))


def _largest_passing(
    shape: tuple[int, ...], high_bit: int, low_bit: int, bits: int, passes: Callable[[Array], Array]
) -> Array:
    """The largest int32 of bits low_bit .. high_bit that `passes`, entry by entry; larger ones must all fail.

    A round finds `bits` bits: as many as there are passing ones among the values that these could have. Where the last
    round would go below `low_bit`, it finds some bits again.
    """

    def find(i: Array, found: Array) -> Array:
        low = jnp.maximum(high_bit + 1 - bits * (i + 1), low_bit)
        known = (found >> (low + bits)) << (low + bits)
        passing = sum(passes(known | (value << low)).astype(jnp.int32) for value in range(1, 1 << bits))
        return known | (passing << low)

    return lax.fori_loop(0, -(-(high_bit + 1 - low_bit) // bits), find, jnp.zeros(shape, jnp.int32))


def kept_neurons(beta: float, mlp_size: int, shards: int = 1) -> int:
    """K = max(1, floor(beta F)), of several `shards` the same of each part; 0.29 * 100 is not to fall to 28."""
    return shards * max(1, floor(beta * mlp_size / shards + 1e-9))


def most_voted(votes: Tally, kept: int, shards: int = 1) -> Array:
    """Ascending int32 [..., K] indices of the `kept` neurons with the most votes of `votes` [..., F].

    Ties go to the larger sum of activations, then to the lower index. Of several `shards`, each keeps its own K / n.
    """
    return best_of_shards(lambda own: jnp.sort(best_first(own)[..., : kept // shards], axis=-1), votes, shards)


Scored = TypeVar("Scored")


def best_of_shards(best: Callable[[Scored], Array], scored: Scored, shards: int) -> Array:
    """Ascending int32 [..., K], of neurons cut into `shards` (n) equal parts: `best` of each part.

    Args:
        best: arrays [..., n, F / n] to ascending int32 [..., n, K / n] of each part's numbers.
        scored: arrays [..., F].
        shards: n.
    """
    if shards == 1:
        return best(scored)
    parts = jax.tree.map(lambda array: array.reshape(*array.shape[:-1], shards, -1), scored)
    size = jax.tree.leaves(parts)[0].shape[-1]
    own = best(parts)
    numbers = own + size * lax.broadcasted_iota(jnp.int32, own.shape, own.ndim - 2)
    return numbers.reshape(*own.shape[:-2], -1)


def best_first(votes: Tally) -> Array:
    """All neurons of `votes` [..., F] in the order in which `most_voted` keeps them: int32 [..., F]."""
    index = lax.broadcasted_iota(jnp.int32, votes.counts.shape, votes.counts.ndim - 1)
    _, _, ranked = lax.sort((-votes.counts, -votes.sums, index), num_keys=2, is_stable=True)
    return ranked


@partial(jax.jit, static_argnames="kept")
def _select(activations: Array, voting: Voting, kept: int) -> Array:
    return most_voted(count_votes(activations[None], voting), kept)[0]


def select_core_neurons(
    activations: Array, alpha: float = 0.4, beta: float = 0.4, budget: Budget = "per_token"
) -> Array:
    """Sentence-wise core neurons of one layer (paper, section 3.2).

    A neuron gets a vote from every token whose largest positive activations it is among: the
    floor(alpha * count of positives) largest under `per_token`, floor(alpha * mean count over the tokens) under
    `mean`, the rule of the authors' code. The K = max(1, floor(beta F)) neurons with the most votes are kept.

    Args:
        activations: [T, F], floating, the inputs of a layer's down projection for T tokens.
        alpha: share of a token's positive neurons that get its vote, in (0, 1].
        beta: keep ratio, in (0, 1].
        budget: `per_token` or `mean`.

    Returns:
        Ascending int32 [K].

    Raises:
        CoreInferError: not [T, F] floats, T = 0 or F = 0, a NaN or infinity, or a setting outside its range.
    """
    check_fraction("alpha", alpha)
    check_fraction("beta", beta)
    check_name("budget", budget, BUDGETS)
    try:
        activations = jnp.asarray(activations)
    except (TypeError, ValueError) as error:
        raise CoreInferError(f"activations: {type(activations).__name__}; give floats [tokens, neurons]") from error
    if activations.ndim != 2 or 0 in activations.shape or not jnp.issubdtype(activations.dtype, jnp.floating):
        raise CoreInferError(
            f"activations of shape {activations.shape}, {activations.dtype}: give floats [tokens, neurons], not empty"
        )
    if not isinstance(activations, jax.core.Tracer) and not bool(jnp.isfinite(activations).all()):
        raise CoreInferError("activations hold NaN or infinity: check the weights they were computed with")
    T, F = activations.shape
    return _select(activations, make_voting(np.ones((1, T), bool), F, alpha, budget), kept_neurons(beta, F))
