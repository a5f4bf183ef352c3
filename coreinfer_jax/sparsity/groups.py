"""Groups of texts and their neurons: as stored (`Clusters`), and as a model decodes with them (`Groups`)."""

from dataclasses import dataclass
from math import floor
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.config import CoreConfig
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.narrow import check_dense, compact
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.votes import kept_neurons

Origin = Literal["topics", "k-means", "published"]


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
        core: how tokens voted, and in `beta` the share of F that is a text's binary vector.
        origin: how the groups were found.
        fingerprint: of the model they belong to.
    """

    frequencies: np.ndarray
    centroids: np.ndarray
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    layer: int
    core: CoreConfig
    origin: Origin
    fingerprint: str

    def sets(self, core: CoreConfig) -> tuple[CoreNeurons, ...]:
        """Every group's K = max(1, floor(gamma F)) most frequent neurons per narrowed layer, ties to the lower index.

        Raises:
            CoreInferError: a published list of fewer than K neurons, layers that select none.
        """
        L, F = self.frequencies.shape[1:]
        kept = kept_neurons(core.group_ratio, F)
        narrowed = core.narrowed_layers(L)
        if self.origin == "published":
            self._check_lengths(core.group_ratio, kept, narrowed)
        ranked = np.argsort(-self.frequencies, axis=-1, kind="stable")[..., :kept]
        chosen = np.sort(ranked, axis=-1).astype(np.int32)
        return tuple(CoreNeurons(group[l] if l in narrowed else None for l in range(L)) for group in chosen)

    def _check_lengths(self, gamma: float, kept: int, narrowed: tuple[int, ...]) -> None:
        lengths = (self.frequencies[:, list(narrowed)] > 0).sum(axis=-1)
        if lengths.min() < kept:
            c, i = np.unravel_index(lengths.argmin(), lengths.shape)
            F = self.frequencies.shape[-1]
            raise CoreInferError(
                f"gamma={gamma}: asks for {kept} of {F} neurons, but the list of group {self.names[c]!r} in layer "
                f"{narrowed[i]} has {lengths.min()}; give at most gamma={_ratio_of(int(lengths.min()), F):.4f}"
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
        core: the keep ratio and layers they are ready for.
        sets: the core neurons of each of the C groups.
        narrowed: `params` narrowed to each of them, of equal shapes; () where groups are gathered when they are used.
        centroids: float32 [C, F].
        tables: of each narrowed layer, int32 [C, K].
        frequencies: of each narrowed layer, float32 [C, F].
    """

    params: Params
    clusters: Clusters
    core: CoreConfig
    sets: tuple[CoreNeurons, ...]
    narrowed: tuple[Params, ...]
    centroids: Array
    tables: list[Array]
    frequencies: list[Array]

    def check(self, params: Params, core: CoreConfig) -> None:
        """Refuse another model than the one these groups were prepared for, and settings other than theirs."""
        if params is not self.params:
            raise CoreInferError("groups were prepared for other params; prepare_groups with the params of this call")
        F = params.config.mlp_size
        kept, asked = kept_neurons(self.core.group_ratio, F), kept_neurons(core.group_ratio, F)
        if kept != asked or core.layers != self.core.layers:
            raise CoreInferError(
                f"groups were prepared for {kept} neurons in layers={self.core.layers}, but core asks for {asked} in "
                f"layers={core.layers}; give prepare_groups the same gamma (or beta) and layers"
            )
        _check_votes(self.clusters, core)


def prepare_groups(params: Params, clusters: Clusters, core: CoreConfig, *, compacted: bool = True) -> Groups:
    """Make `clusters` ready to generate with.

    Args:
        params: dense weights of the model the clusters belong to.
        clusters: from `load_clusters` or `build_clusters`.
        core: whose `gamma` (or `beta`) and `layers` the groups' neurons are chosen by.
        compacted: gather every group's narrowed weights now, so that a prompt's group costs nothing more. They take
            C times the memory of one narrowed model's MLPs. Otherwise each prompt gathers those of its group.

    Returns:
        `Groups`, for the `groups` of `generate`, `stream` and `converse`.

    Raises:
        CoreInferError: clusters of another model, settings the clusters' votes were not counted by, a published list
            shorter than gamma asks for.
    """
    check_dense(params)
    if not isinstance(clusters, Clusters):
        raise CoreInferError(f"clusters={shown(clusters)}: give Clusters, from load_clusters or build_clusters")
    if not isinstance(core, CoreConfig):
        raise CoreInferError(f"core={shown(core)}: give the CoreConfig to generate with")
    clusters.check(params)
    _check_votes(clusters, core)
    sets = clusters.sets(core)
    narrowed = core.narrowed_layers(params.config.num_layers)
    return Groups(
        params=params,
        clusters=clusters,
        core=core,
        sets=sets,
        narrowed=tuple(compact(params, chosen) for chosen in sets) if compacted else (),
        centroids=jnp.asarray(clusters.centroids),
        tables=[jnp.asarray(np.stack([_indices(chosen, l) for chosen in sets])) for l in narrowed],
        frequencies=[jnp.asarray(clusters.frequencies[:, l]) for l in narrowed],
    )


def _ratio_of(neurons: int, mlp_size: int) -> float:
    """The largest keep ratio of four decimals that keeps no more than `neurons` of F."""
    return floor(neurons / mlp_size * 1e4) / 1e4


def _indices(chosen: CoreNeurons, layer: int) -> np.ndarray:
    indices = chosen.layers[layer]
    assert indices is not None, "narrowed layers have indices"
    return indices


def _check_votes(clusters: Clusters, core: CoreConfig) -> None:
    """Refuse settings by which a prompt would vote differently from the texts of the groups."""
    theirs = clusters.core
    if (theirs.alpha, theirs.budget, theirs.count_bos) != (core.alpha, core.budget, core.count_bos):
        settings = f"alpha={theirs.alpha}, budget={theirs.budget!r}, count_bos={theirs.count_bos}"
        raise CoreInferError(f"the clusters' texts voted with {settings}; choose the same, or build them again")
    if core.method == "fused" and clusters.origin == "published":
        raise CoreInferError("method='fused' weighs frequencies, which published lists do not hold; use 'similarity'")
