"""Groups of texts and their neurons: as stored (`Clusters`), and as a model decodes with them (`Groups`)."""

from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import floor
from typing import Literal

import jax
import numpy as np
from jax import Array

from coreinfer_jax.checks import check_flag, check_fraction
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.host import is_on_host, layers_on_device
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import explained_by
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.ranking import stand_ins
from coreinfer_jax.sparsity.rules import Votes
from coreinfer_jax.sparsity.votes import kept_neurons

Origin = Literal["topics", "k-means", "published"]


@dataclass(frozen=True, kw_only=True)
class TextVectors:
    """How a text gets its binary core-neuron vector: the paper's votes, and a share of the neurons (section 3.3).

    Attributes:
        votes: how the text's tokens vote.
        beta: share of F, those with the most votes, that are the vector's ones, in (0, 1].
        count_bos: whether a beginning-of-sequence token at the start of the text votes.

    Raises:
        CoreInferError: a value outside its range.
    """

    votes: Votes = field(default_factory=Votes)
    beta: float = 0.2
    count_bos: bool = True

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        check_flag("count_bos", self.count_bos)


@dataclass(frozen=True, eq=False)
class Clusters:
    """What groups of texts activate in one model (paper, section 3.3).

    Attributes:
        frequencies: float32 [C, L, F]; the share of a group's tokens of which a neuron is a token-wise core neuron. Of
            published lists, which hold no frequencies, falling numbers down the list, 0 for neurons that are not on it.
        centroids: float32 [C, F]; mean binary core-neuron vector, at `layer`, of a group's texts. A prompt belongs to
            the group whose centroid is nearest to its own vector (Euclidean, ties to the lower group).
        names: of the groups; topics where the texts were labelled.
        sizes: texts per group; 0 where not known.
        layer: the layer whose core neurons decide on the group.
        vectors: how texts, and prompts, get the vectors that are compared.
        origin: how the groups were found.
        fingerprint: of the model they belong to.
    """

    frequencies: np.ndarray
    centroids: np.ndarray
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    layer: int
    vectors: TextVectors
    origin: Origin
    fingerprint: str

    def sets(self, gamma: float, narrowed: tuple[int, ...], shards: int = 1, fewer: int = 0) -> tuple[CoreNeurons, ...]:
        """Every group's K = max(1, floor(gamma F)) most frequent neurons per layer `narrowed`, ties to the lower index.

        Of several `shards`, equal parts of a layer's neurons, each keeps its own K / n. K is `fewer` neurons less where
        linear ones take their place.

        Raises:
            CoreInferError: a published list of fewer than K neurons.
        """
        L, F = self.frequencies.shape[1:]
        share = kept_neurons(gamma, F, shards)
        kept = share - fewer
        if self.origin == "published":
            self._check_lengths(gamma, share, kept, narrowed)
        parts = self.frequencies.reshape(*self.frequencies.shape[:-1], shards, F // shards)
        ranked = np.argsort(-parts, axis=-1, kind="stable")[..., : kept // shards]
        numbers = np.sort(ranked, axis=-1) + np.arange(shards)[:, None] * (F // shards)
        chosen = numbers.reshape(*numbers.shape[:-2], kept).astype(np.int32)
        return tuple(CoreNeurons(group[l] if l in narrowed else None for l in range(L)) for group in chosen)

    def _check_lengths(self, gamma: float, share: int, kept: int, narrowed: tuple[int, ...]) -> None:
        lengths = (self.frequencies[:, list(narrowed)] > 0).sum(axis=-1)
        if lengths.min() < kept:
            c, i = np.unravel_index(lengths.argmin(), lengths.shape)
            F, most = self.frequencies.shape[-1], int(lengths.min()) + share - kept
            raise CoreInferError(
                f"gamma={gamma}: asks for {kept} of {F} neurons, but the list of group {self.names[c]!r} in layer "
                f"{narrowed[i]} has {lengths.min()}; give at most gamma={_ratio_of(most, F):.4f}"
            )

    def largest_ratio(self) -> float:
        """The largest gamma, to four decimals, that published lists are long enough for; 1 for other groups."""
        if self.origin != "published":
            return 1.0
        return _ratio_of(int((self.frequencies > 0).sum(axis=-1).min()), self.frequencies.shape[-1])

    def check(self, params: Params) -> None:
        """Refuse a model these clusters were not made for."""
        found, sizes = fingerprint(params), (params.config.num_layers, params.config.mlp_size)
        if found != self.fingerprint or self.frequencies.shape[1:] != sizes:
            raise CoreInferError(
                f"clusters belong to the model with fingerprint {self.fingerprint}, but this one's is {found}; "
                "build clusters for this model, or name theirs (float16 weights count as another model)"
            )


@dataclass(frozen=True, eq=False)
class Groups:
    """`Clusters` made ready for a model: index sets and, where wanted, narrowed weights, once for all prompts.

    Attributes:
        params: the model, dense.
        clusters: what is known of the groups.
        gamma: the keep ratio they are ready for.
        layers: the layers that are narrowed, as fractions of depth.
        sets: the core neurons of each of the C groups, without what stands for all others.
        narrowed: `params` narrowed to each of them, of equal shapes; () where groups are gathered when they are used.
        centroids: float32 [C, F].
        tables: of each narrowed layer, int32 [C, K].
        frequencies: of each narrowed layer, float32 [C, F].
        linear: whether linear neurons stand beside the groups' own.
    """

    params: Params
    clusters: Clusters
    gamma: float
    layers: tuple[float, float]
    sets: tuple[CoreNeurons, ...]
    narrowed: tuple[Params, ...]
    centroids: Array
    tables: list[Array]
    frequencies: list[Array]
    linear: bool

    @cached_property
    def offsets(self) -> list[Array]:
        """Of each narrowed layer, float32 [C, D], where linear neurons stand beside the groups' own; else empty.

        Made when first asked for: a plan of a model that is not loaded needs none.
        """
        if not self.linear:
            return []
        narrowed = _narrowed_layers(self.sets[0])
        if not is_on_host(self.params):
            return constants_written(self.params, narrowed, self.tables)
        made: list[Array] = []
        with closing(layers_on_device(self.params, {})) as layers:
            for l, layer in enumerate(layers):
                jax.block_until_ready(made)  # the MLP before this one is free then, and the next may come
                if l in narrowed:
                    there = replace(self.params, layers=(*self.params.layers[:l], layer, *self.params.layers[l + 1 :]))
                    made += constants_written(there, (l,), [self.tables[narrowed.index(l)]])
        return made

    @cached_property
    def cores(self) -> tuple[CoreNeurons, ...]:
        """The core neurons of each of the C groups, with what stands for all others."""
        return tuple(self._with_offsets(c, own) for c, own in enumerate(self.sets)) if self.linear else self.sets

    def _with_offsets(self, c: int, own: CoreNeurons) -> CoreNeurons:
        by_layer = dict(zip(_narrowed_layers(own), [offsets[c] for offsets in self.offsets], strict=True))
        return CoreNeurons(own.layers, [by_layer.get(l) for l in range(len(own.layers))], linear=True)


def _narrowed_layers(core: CoreNeurons) -> tuple[int, ...]:
    return tuple(l for l, indices in enumerate(core.layers) if indices is not None)


def constants_written(params: Params, layers: tuple[int, ...], indices: list[Array]) -> list[Array]:
    """What the constants of linear fits write for all neurons outside of sets.

    Args:
        params: with linear neurons in their calibration.
        layers: some of the model's.
        indices: of each, ascending int32 [R, K].

    Returns:
        Of each, float32 [R, D].
    """
    known = explained_by(params)
    assert known is not None, "linear neurons stand beside the sets"
    downs, constants = [params.layers[l].mlp.down for l in layers], [known.fits[l].constants for l in layers]
    return stand_ins(indices, downs, constants, mesh=params.mesh)


def _ratio_of(neurons: int, mlp_size: int) -> float:
    """The largest keep ratio of four decimals that keeps no more than `neurons` of F."""
    return floor(neurons / mlp_size * 1e4) / 1e4
