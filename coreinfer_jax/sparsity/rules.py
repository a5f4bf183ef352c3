"""Rules that rank the neurons of a layer by what they did on some tokens: sums over tokens in, scores out.

A rule is a value. Its `observer` reduces activations [B, T, F] to sums over the counted tokens, float32 [B] or [B, F]
each, which add up over the parts of a text and over texts, so that everything streams and a corpus can stand beside a
prompt. Its `score` turns sums into scores [B, F]; the K highest are kept, ties to the lower index.
||w_n|| is the norm of neuron n's column of the down projection: a_n w_n is what the neuron adds to the MLP's output.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from coreinfer_jax.checks import check_fraction, check_name, check_number
from coreinfer_jax.model import MlpPass
from coreinfer_jax.model.shards import WHOLE, along, own_part, shards_here, total
from coreinfer_jax.model.weights import Layer
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.votes import (
    BUDGETS,
    Budget,
    Tally,
    Voting,
    best_first,
    count_votes,
    make_voting,
    some_tokens,
)

# Always there: `tokens` [B], how many were counted; `weight` [B], the sum of their weights; `total` [B, F], the
# weighted sum of activations. A rule adds its own, [B, F].
Sums: TypeAlias = dict[str, Array]

MOST_TOKENS = 1e9


@struct.dataclass
class Summed:
    """Sums of layers, by whatever observer: arrays [R] of prompts, and [R, F] of their neurons."""

    sums: Any

    def specs(self) -> "Summed":
        """Neurons are spread over devices."""
        by_neurons: Summed = jax.tree.map(lambda array: along(1, 2) if array.ndim == 2 else WHOLE, self)
        return by_neurons


class Observer(Protocol):
    """What is summed up of a layer's activations: a pytree, so that masks and shares are data of compiled programs."""

    @property
    def adds_up(self) -> bool:
        """Whether the sums over pieces of the tokens add up to those over all of them."""

    def piece(self, start: Array, size: int) -> "Observer":
        """The observer of the tokens start .. start + size - 1 alone, of each row of the T that it is for."""

    def of_layer(self, l: int) -> "Observer":
        """The observer of layer `l` alone, which it then may be told by any number: one program serves many layers."""

    def __call__(self, l: int, layer: Layer, seen: MlpPass) -> Any:
        """The sums of layer `l` over the counted tokens of what its MLP made of B T tokens."""


@struct.dataclass
class Moments:
    """Weighted sums of activations and of their squares: a token's weight makes its `scale` 1, one of zeros has none.

    Where linear neurons stand for what is left out, the sums are of what these do not explain.

    Attributes:
        counted: bool [B, T], the tokens that count.
        scale: (activations float32 [B, T, F], ||w|| [F]) to [B, T].
        fits: of each layer, None of those without linear neurons; or a single one, for whichever layer.
    """

    counted: Array
    scale: Callable[[Array, Array], Array] = struct.field(pytree_node=False)
    fits: tuple[LinearFit | None, ...] | None = None

    @property
    def adds_up(self) -> bool:
        """Always: tokens are weighed one by one."""
        return True

    def piece(self, start: Array, size: int) -> "Moments":
        """The observer of some tokens alone."""
        return replace(self, counted=some_tokens(self.counted, start, size))

    def of_layer(self, l: int) -> "Moments":
        """The observer of one layer, whatever its number."""
        own = None if self.fits is None else self.fits[l]
        return replace(self, fits=None if own is None else (own,))

    def weights(self, layer: Layer, seen: MlpPass) -> Array:
        """The weight of each token, float32 [B, T]; 0 where it does not count."""
        wide = jnp.where(self.counted[:, :, None], seen.activations.astype(jnp.float32), 0)
        scales = self.scale(wide, layer.mlp.down.input_norms())
        return jnp.where(self.counted & (scales > 0), 1 / jnp.where(scales > 0, scales, 1), 0)

    def __call__(self, l: int, layer: Layer, seen: MlpPass) -> Sums:
        """The sums of one layer."""
        weights = self.weights(layer, seen)
        fit = None if self.fits is None else self.fits[l if len(self.fits) > 1 else 0]
        whole = seen.activations.astype(jnp.float32) if fit is None else fit.unexplained(seen)
        missed = jnp.where(self.counted[:, :, None], whole, 0)
        return {
            "tokens": jnp.sum(self.counted, axis=1, dtype=jnp.float32),
            "weight": weights.sum(axis=1),
            "total": jnp.sum(weights[:, :, None] * missed, axis=1),
            "squares": jnp.sum(weights[:, :, None] * jnp.square(missed), axis=1),
        }


@struct.dataclass
class Totals:
    """The sums that every rule has, all tokens of equal weight.

    Attributes:
        counted: bool [B, T], the tokens that count.
    """

    counted: Array

    @property
    def adds_up(self) -> bool:
        """Always: tokens are weighed one by one."""
        return True

    def piece(self, start: Array, size: int) -> "Totals":
        """The observer of some tokens alone."""
        return replace(self, counted=some_tokens(self.counted, start, size))

    def of_layer(self, l: int) -> "Totals":
        """Itself: all layers are alike."""
        return self

    def __call__(self, l: int, layer: Layer, seen: MlpPass) -> Sums:
        """The sums of one layer."""
        tokens = jnp.sum(self.counted, axis=1, dtype=jnp.float32)
        total = jnp.sum(jnp.where(self.counted[:, :, None], seen.activations, 0), axis=1, dtype=jnp.float32)
        return {"tokens": tokens, "weight": tokens, "total": total}


@struct.dataclass
class VoteCount:
    """Votes for activations, or for their magnitudes, beside the sums that every rule has.

    Attributes:
        voting: who votes, and with how many voices.
        magnitudes: whether all neurons that are not zero compete, and not only positive ones.
    """

    voting: Voting
    magnitudes: bool = struct.field(pytree_node=False)

    @property
    def adds_up(self) -> bool:
        """Whether tokens vote one by one."""
        return self.voting.adds_up

    def piece(self, start: Array, size: int) -> "VoteCount":
        """The observer of some tokens alone."""
        return replace(self, voting=self.voting.piece(start, size))

    def of_layer(self, l: int) -> "VoteCount":
        """Itself: all layers are alike."""
        return self

    def __call__(self, l: int, layer: Layer, seen: MlpPass) -> Sums:
        """The sums of one layer."""
        votes = count_votes(jnp.abs(seen.activations) if self.magnitudes else seen.activations, self.voting)
        ties = "magnitudes" if self.magnitudes else "total"
        own = {ties: votes.sums, "votes": votes.counts.astype(jnp.float32)}
        return Totals(self.voting.counted)(l, layer, seen) | own


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A way to rank neurons.

    Attributes:
        prior_tokens: how many tokens of a prompt a calibration's sums by this rule weigh as much as; 0 leaves them out.

    Raises:
        CoreInferError: a setting outside its range.
    """

    prior_tokens: float = 0.0
    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_number("prior_tokens", self.prior_tokens, 0, MOST_TOKENS)

    def observer(self, counted: np.ndarray, mlp_size: int) -> Observer:
        """What to sum up over the tokens `counted` bool [B, T] of layers with `mlp_size` (F) neurons."""
        return Totals(jnp.asarray(counted))

    @staticmethod
    @abstractmethod
    def score(sums: Sums, norms: Array, compensation: Array) -> Array:
        """Scores float32 [B, F].

        Args:
            sums: of the rule's observer.
            norms: ||w||, [F].
            compensation: share of its mean activation that stands for a neuron which is not kept, [].
        """


def _written(wide: Array, norms: Array) -> Array:
    """Sum over neurons of the squared norms of what they add to the output."""
    return total(jnp.sum(jnp.square(wide * norms[None, None, :]), axis=-1))


def _squared_norm(wide: Array, norms: Array) -> Array:
    return total(jnp.sum(jnp.square(wide), axis=-1))


def _unscaled(wide: Array, norms: Array) -> Array:
    return jnp.ones(wide.shape[:2], jnp.float32)


def _spread(sums: Sums, norms: Array, compensation: Array) -> Array:
    """Weighted sum of squares of a_n - compensation * mean a_n: what is lost of a_n when it is dropped."""
    # Expanded: squares - 2 c total + c^2 weight, with c = compensation * total / weight.
    counted_twice = compensation * (2 - compensation)
    return sums["squares"] - counted_twice * mean_activations(sums) * sums["total"]


def _spread_written(sums: Sums, norms: Array, compensation: Array) -> Array:
    """`_spread` of a_n ||w_n||: what dropping the neuron changes in the output."""
    return _spread(sums, norms, compensation) * jnp.square(norms)[None, :]


class _MomentRule(Rule):
    """A rule over moments."""

    score = staticmethod(_spread_written)

    @staticmethod
    @abstractmethod
    def scale(wide: Array, norms: Array) -> Array:
        """What a token's weight makes 1, [B, T], of its activations float32 [B, T, F]."""

    def observer(self, counted: np.ndarray, mlp_size: int, fits: tuple[LinearFit | None, ...] | None = None) -> Moments:
        """The moments of the counted tokens, beside linear neurons those of what their `fits` leave."""
        return Moments(jnp.asarray(counted), self.scale, fits)


@dataclass(frozen=True, kw_only=True)
class Contribution(_MomentRule):
    """What a neuron adds to the output, as a share of what its token's neurons add: the rule that measured best."""

    prior_tokens: float = 256.0
    name: ClassVar[str] = "contribution"
    scale = staticmethod(_written)


@dataclass(frozen=True, kw_only=True)
class Griffin(_MomentRule):
    """GRIFFIN's rule (arXiv 2404.01365): mean squares, each token's scaled to a sum of 1."""

    name: ClassVar[str] = "griffin"
    scale = staticmethod(_squared_norm)
    score = staticmethod(_spread)


@dataclass(frozen=True, kw_only=True)
class GriffinNorm(_MomentRule):
    """GRIFFIN's rule times the norm of what a neuron writes."""

    name: ClassVar[str] = "griffin-norm"
    scale = staticmethod(_squared_norm)


@dataclass(frozen=True, kw_only=True)
class Energy(_MomentRule):
    """The mean square of what a neuron adds to the output, all tokens alike."""

    name: ClassVar[str] = "energy"
    scale = staticmethod(_unscaled)


@dataclass(frozen=True, kw_only=True)
class Votes(Rule):
    """The paper's votes (section 3.2).

    Attributes:
        alpha: share of a token's positive neurons that become its token-wise core neurons, in (0, 1].
        budget: `per_token` gives each token alpha times its own count of positive neurons (the paper's text); `mean`
            gives every token alpha times its own prompt's mean count (the authors' code), also where rows vote
            together.
    """

    alpha: float = 0.4
    budget: Budget = "per_token"
    name: ClassVar[str] = "votes"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("alpha", self.alpha)
        check_name("budget", self.budget, BUDGETS)

    def voting(self, counted: np.ndarray, mlp_size: int) -> Voting:
        """How the tokens `counted` bool [B, T] vote."""
        return make_voting(counted, mlp_size, self.alpha, self.budget)

    def observer(self, counted: np.ndarray, mlp_size: int) -> Observer:
        """The votes of the counted tokens."""
        return VoteCount(self.voting(counted, mlp_size), magnitudes=False)

    @staticmethod
    def score(sums: Sums, norms: Array, compensation: Array) -> Array:
        """Scores that order neurons as votes do: by counts, then by sums of activations, then by index."""
        return -_inverted(best_first(Tally(sums["votes"], sums["total"]))).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class MagnitudeVotes(Votes):
    """Votes on the magnitudes of activations: all neurons that are not zero compete."""

    name: ClassVar[str] = "magnitude-votes"

    def observer(self, counted: np.ndarray, mlp_size: int) -> Observer:
        """The votes of the counted tokens."""
        return VoteCount(self.voting(counted, mlp_size), magnitudes=True)

    @staticmethod
    def score(sums: Sums, norms: Array, compensation: Array) -> Array:
        """As of votes, ties broken by sums of magnitudes."""
        return Votes.score(sums | {"total": sums["magnitudes"]}, norms, compensation)


@dataclass(frozen=True, kw_only=True)
class Norm(Rule):
    """A floor: the norm of what a neuron writes, whatever the prompt."""

    name: ClassVar[str] = "norm"

    @staticmethod
    def score(sums: Sums, norms: Array, compensation: Array) -> Array:
        """Norms."""
        return jnp.broadcast_to(norms[None, :], sums["total"].shape)


@dataclass(frozen=True, kw_only=True)
class Random(Rule):
    """A floor: the same random order for every prompt."""

    name: ClassVar[str] = "random"

    @staticmethod
    def score(sums: Sums, norms: Array, compensation: Array) -> Array:
        """Random numbers."""
        return jnp.broadcast_to(
            own_part(jax.random.uniform(jax.random.key(0), (shards_here() * len(norms),)), 0)[None, :],
            sums["total"].shape,
        )


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Contribution, Votes, MagnitudeVotes, Griffin, GriffinNorm, Energy, Norm, Random)
}


def rule_named(rule: Rule | str) -> Rule:
    """A rule, or the one of that name as it is by default.

    Raises:
        CoreInferError: there is none of that name.
    """
    if isinstance(rule, Rule):
        return rule
    check_name("rule", rule, tuple(RULES))
    return RULES[rule]()


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


def places(scores: Array, shards: int = 1) -> Array:
    """How many neurons come before each in the order of `scores` [B, F], the highest first: int32 [B, F].

    The neurons that a keep ratio keeps are those with a place below K. Of several `shards`, equal parts of the neurons,
    the first of each part come first, then the second of each, and so on, so that K of them are K / n of each part.
    """
    B, F = scores.shape
    parts = scores.reshape(B * shards, F // shards)
    own = _inverted(jnp.argsort(-parts, axis=-1, stable=True)).reshape(B, shards, F // shards)
    return (own * shards + jnp.arange(shards, dtype=own.dtype)[None, :, None]).reshape(B, F)


def _inverted(order: Array) -> Array:
    """Where each index stands in permutations `order` int32 [B, F]."""
    index = lax.broadcasted_iota(jnp.int32, order.shape, 1)
    rows = jnp.arange(order.shape[0])[:, None]
    return jnp.zeros(order.shape, jnp.int32).at[rows, order].set(index)
