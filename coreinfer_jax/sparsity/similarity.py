"""Ways of choosing with groups of texts (paper, section 3.3): `Similarity`, `Fused` with the prompt, `Auto` of both."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh

from coreinfer_jax.checks import check_fraction, check_number, check_whole
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model import MlpPass
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.shards import constrained
from coreinfer_jax.model.weights import Layer, Params, check_dense
from coreinfer_jax.sparsity.choice import Choice, Chooser, Chosen, Ranked, Seen, ToNarrow, by_set, to_gather
from coreinfer_jax.sparsity.groups import Clusters, Groups, constants_written
from coreinfer_jax.sparsity.measures import fused, nearest_group, stability_figure
from coreinfer_jax.sparsity.narrow import compact
from coreinfer_jax.sparsity.rules import MOST_TOKENS, Observer, Sums, Votes
from coreinfer_jax.sparsity.votes import Tally, Voting, count_each, kept_neurons, most_voted, some_tokens


@dataclass(frozen=True, kw_only=True)
class GroupChooser(Chooser):
    """What ways of choosing that use groups have: groups are made of votes, so prompts vote.

    Attributes:
        votes: how tokens vote.
        needs_frequencies: whether it asks how often a group's neurons were voted for, and not only which were.
    """

    votes: Votes = field(default_factory=Votes)
    needs_frequencies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.votes) is not Votes:
            raise CoreInferError(f"votes={shown(self.votes)}: groups are made of votes; give rules.Votes(...)")
        if self.votes.prior_tokens:
            raise CoreInferError(f"votes={shown(self.votes)}: groups take the place of a prior; leave prior_tokens out")

    @property
    def adds_up(self) -> bool:
        """Whether sums over the parts of a conversation are all that it needs."""
        return self.votes.budget == "per_token"

    @property
    @abstractmethod
    def group_ratio(self) -> float:
        """Share of F kept of a group's neurons."""

    def check(self, params: Params, groups: Groups | None, rows: int) -> None:
        """Refuse groups that are missing or do not fit."""
        if groups is None:
            raise CoreInferError(f"the method {self.method!r} needs groups: give those of prepare_groups")
        if not isinstance(groups, Groups):
            raise CoreInferError(f"groups={shown(groups)}: give what prepare_groups returns")
        if params is not groups.params:
            raise CoreInferError("groups were prepared for other params; prepare_groups with the params of this call")
        kept, asked = (self._share(ratio, params) for ratio in (groups.gamma, self.group_ratio))
        if kept != asked or self.layers != groups.layers:
            raise CoreInferError(
                f"groups were prepared for {kept} neurons in layers={groups.layers}, but core asks for {asked} in "
                f"layers={self.layers}; give prepare_groups the same gamma (or beta) and layers"
            )
        if groups.linear != self.of_ratio(self.group_ratio, params)[1]:
            raise CoreInferError(
                f"groups were prepared {'with' if groups.linear else 'without'} linear neurons, but core asks for "
                f"linear={self.linear}; give prepare_groups the same"
            )
        self.check_votes(groups.clusters)

    def _share(self, ratio: float, params: Params) -> int:
        return kept_neurons(ratio, params.config.mlp_size, self.shards_of(params))

    def of_ratio(self, ratio: float, params: Params) -> tuple[int, bool]:
        """How many neurons of a narrowed layer a keep ratio keeps beside linear ones, and whether there are any."""
        [kept], [linear] = self.beside_linear((self._share(ratio, params),), params)
        return kept, linear

    def to_narrow(self, params: Params, groups: Groups | None, rows: int) -> ToNarrow:
        """What is gathered, less what linear neurons cost of it."""
        shares, sets = self.gathered(params, groups, rows)
        layers = list(zip(shares, *self.beside_linear(shares, params), strict=True))
        kept = tuple(width if share else None for share, width, _ in layers)
        linear = tuple(bool(share) and beside for share, _, beside in layers)
        return ToNarrow(kept, sets, linear, linear)

    def check_votes(self, clusters: Clusters) -> None:
        """Refuse clusters whose texts voted differently from how prompts would, or did not say how often."""
        theirs = clusters.vectors
        if (theirs.votes, theirs.count_bos) != (self.votes, self.count_bos):
            settings = f"alpha={theirs.votes.alpha}, budget={theirs.votes.budget!r}, count_bos={theirs.count_bos}"
            raise CoreInferError(f"the clusters' texts voted with {settings}; choose the same, or build them again")
        if self.needs_frequencies and clusters.origin == "published":
            raise CoreInferError(
                f"the method {self.method!r} weighs frequencies, which published lists do not hold; take Similarity"
            )

    def observed_layers(self, config: ModelConfig, groups: Groups | None) -> tuple[int, ...]:
        """The narrowed ones, and the one that decides on the group."""
        own = self.narrowed_layers(config.num_layers)
        return own if groups is None else tuple(sorted({*own, groups.clusters.layer}))

    def observer(self, counted: np.ndarray, params: Params) -> Observer:
        """Votes."""
        return self.votes.observer(counted, params.config.mlp_size)

    def _assigned(self, sums: Mapping[int, Sums], groups: Groups) -> Array:
        """The group of every prompt, int32 [R]."""
        vectors, F = groups.clusters.vectors, groups.centroids.shape[-1]
        return _nearest(
            sums[groups.clusters.layer], groups.centroids, kept=kept_neurons(vectors.beta, F), mesh=groups.params.mesh
        )


@dataclass(frozen=True, kw_only=True)
class Similarity(GroupChooser):
    """Similarity-guided: the neurons of the group of texts that the prompt is nearest to.

    `layers`, `per_row`, `count_bos` and `linear` are those of every `Chooser`.

    Attributes:
        gamma: keep ratio of a group's neurons, in (0, 1].
        votes: how the prompt's tokens vote for the vector that finds its group; as the groups' texts did.

    Raises:
        CoreInferError: a value outside its range.
    """

    gamma: float = 0.5
    method: ClassVar[str] = "similarity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("gamma", self.gamma)

    @property
    def group_ratio(self) -> float:
        """`gamma`."""
        return self.gamma

    def observed_layers(self, config: ModelConfig, groups: Groups | None) -> tuple[int, ...]:
        """The one that decides on the group."""
        return () if groups is None else (groups.clusters.layer,)

    def gathered(self, params: Params, groups: Groups | None, rows: int) -> tuple[tuple[int, ...], int]:
        """The groups' neurons; nothing where a group's weights are there already."""
        return _of_groups(self, self.gamma, params, groups, rows)

    def choose(self, seen: Seen) -> Chosen:
        """The neurons of each prompt's group."""
        assert seen.groups is not None, "checked"
        sums, _ = by_set(self, seen)
        assigned = self._assigned(sums, seen.groups)
        choices = tuple(Choice("similarity", group=group) for group in np.asarray(assigned).tolist())
        return _of_assigned(self, seen, assigned, choices)


@dataclass(frozen=True, kw_only=True)
class Fused(GroupChooser):
    """The neurons with most votes when the frequencies of the prompt's group count as more tokens of the prompt.

    `layers`, `per_row`, `count_bos` and `linear` are those of every `Chooser`.

    Attributes:
        beta: keep ratio, in (0, 1].
        group_tokens: how many tokens of the prompt the group's frequencies weigh as much as.
        votes: how tokens vote; as the groups' texts did.

    Raises:
        CoreInferError: a value outside its range.
    """

    beta: float = 0.5
    group_tokens: float = 64.0
    method: ClassVar[str] = "fused"
    needs_frequencies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("beta", self.beta)
        check_number("group_tokens", self.group_tokens, 0, MOST_TOKENS)

    @property
    def group_ratio(self) -> float:
        """`beta`."""
        return self.beta

    def gathered(self, params: Params, groups: Groups | None, rows: int) -> tuple[tuple[int, ...], int]:
        """What is kept of the narrowed layers."""
        return _alike(self, self.beta, params), self.sets(rows)

    def choose(self, seen: Seen) -> Chosen:
        """The most voted neurons, votes of the group counted in."""
        assert seen.groups is not None, "checked"
        sums, _ = by_set(self, seen)
        assigned = self._assigned(sums, seen.groups)
        narrowed = self.narrowed_layers(seen.params.config.num_layers)
        if seen.ranked:
            indices, offsets = _of_groups_ranked([seen.ranked[l] for l in narrowed], assigned)
        else:
            indices, offsets = self._ranked(seen, narrowed, sums, assigned)
        choices = tuple(Choice("fused", group=group) for group in np.asarray(assigned).tolist())
        return to_gather(narrowed, indices, offsets, seen.params, choices, bool(offsets))

    def rank_layer(self, seen: Seen, l: int) -> Ranked | None:
        """With linear neurons, what each group would make of a layer, [R, C, K] and [R, C, D].

        Which group a prompt has is known once all layers are read.
        """
        if seen.groups is None or not seen.narrowing.linear[l]:
            return None
        sums, _ = by_set(self, seen)
        R, C = len(sums[l]["votes"]), len(seen.groups.centroids)
        # One after the other: a plan has room for one.
        made = [jax.block_until_ready(self._ranked(seen, (l,), sums, jnp.full(R, c, jnp.int32))) for c in range(C)]
        indices, offsets = (jnp.stack([own for [own] in arrays], axis=1) for arrays in zip(*made, strict=True))
        return indices, offsets

    def _ranked(
        self, seen: Seen, layers: tuple[int, ...], sums: Mapping[int, Sums], assigned: Array
    ) -> tuple[list[Array], list[Array]]:
        """The most voted neurons of some layers, and what linear neurons leave constant; [] without these."""
        groups, narrowed = seen.groups, self.narrowed_layers(seen.params.config.num_layers)
        assert groups is not None, "checked"
        kept, linear = self.of_ratio(self.beta, seen.params)
        indices = _fused(
            [sums[l] for l in layers],
            [groups.frequencies[narrowed.index(l)] for l in layers],
            assigned,
            np.float32(self.group_tokens),
            kept=kept,
            shards=self.shards_of(seen.params),
        )
        return indices, constants_written(seen.params, layers, indices) if linear else []


@struct.dataclass
class _WholeAndEarly:
    """Votes of all counted tokens, and apart those of each prompt's first half.

    Attributes:
        voting: who votes, and with how many voices.
        early: bool [B, T], the first half of the counted tokens.
    """

    voting: Voting
    early: Array

    @property
    def adds_up(self) -> bool:
        """Whether tokens vote one by one: which are early is known before."""
        return self.voting.adds_up

    def piece(self, start: Array, size: int) -> "_WholeAndEarly":
        """The votes of some tokens alone."""
        return replace(self, voting=self.voting.piece(start, size), early=some_tokens(self.early, start, size))

    def of_layer(self, l: int) -> "_WholeAndEarly":
        """Itself: all layers are alike."""
        return self

    def __call__(self, l: int, layer: Layer, seen: MlpPass) -> dict[str, Tally]:
        """The votes of one layer."""
        whole, early = count_each(seen.activations, self.voting, (self.voting.counted, self.early))
        return {"whole": whole, "early": early}


@dataclass(frozen=True, kw_only=True)
class Auto(GroupChooser):
    """For a stable prompt its own most voted neurons, for others those of its group; its own where there are no groups.

    `layers`, `per_row`, `count_bos` and `linear` are those of every `Chooser`.

    Attributes:
        beta: keep ratio of the prompt's own neurons, in (0, 1].
        gamma: keep ratio of a group's neurons, in (0, 1]; None takes `beta`.
        least_stability: the stability figure from which a prompt is stable. The default is about where, on the embedded
            models at beta 0.4 and 0.7, the prompt's own neurons begin to foretell those of prompt and continuation
            better than its group's do (docs/core-neurons.md).
        least_tokens: the number of voting tokens from which a prompt may be stable, at least 2. The figure of a shorter
            one says little, whatever its value. Where rows share one set the shortest row counts.
        votes: how tokens vote; as the groups' texts did.

    Raises:
        CoreInferError: a value outside its range.
    """

    beta: float = 0.5
    gamma: float | None = None
    least_stability: float = 0.7
    least_tokens: int = 32
    method: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("beta", self.beta)
        if self.gamma is not None:
            check_fraction("gamma", self.gamma)
        check_number("least_stability", self.least_stability, -1, 1)
        check_whole("least_tokens", self.least_tokens, 2)

    @property
    def adds_up(self) -> bool:
        """It asks what the first half of the whole conversation votes."""
        return False

    @property
    def group_ratio(self) -> float:
        """`gamma`, or `beta`."""
        return self.beta if self.gamma is None else self.gamma

    def check(self, params: Params, groups: Groups | None, rows: int) -> None:
        """Refuse groups that do not fit, and rows of one batch that would keep different numbers."""
        if groups is None:
            return
        super().check(params, groups, rows)
        own, group = (self._share(ratio, params) for ratio in (self.beta, self.group_ratio))
        if self.per_row and rows > 1 and own != group:
            raise CoreInferError(
                f"beta={self.beta} keeps {own} neurons and gamma={self.gamma} {group}: rows of one batch need the same "
                "number; give equal ratios, one row at a time, or per_row=False"
            )

    def observer(self, counted: np.ndarray, params: Params) -> Observer:
        """Votes of all tokens and of each prompt's first half, rounded down."""
        early = counted & (np.cumsum(counted, axis=1) <= counted.sum(axis=1, keepdims=True) // 2)
        return _WholeAndEarly(self.votes.voting(counted, params.config.mlp_size), jnp.asarray(early))

    def gathered(self, params: Params, groups: Groups | None, rows: int) -> tuple[tuple[int, ...], int]:
        """The fewer of the prompt's and the group's neurons; nothing where a group's weights may be there already."""
        return _of_groups(self, min(self.beta, self.group_ratio) if groups else self.beta, params, groups, rows)

    def to_narrow(self, params: Params, groups: Groups | None, rows: int) -> ToNarrow:
        """The more of the prompt's and the group's neurons."""
        larger = replace(self, beta=max(self.beta, self.group_ratio), gamma=None) if groups else self
        return super(Auto, larger).to_narrow(params, groups, rows)

    def choose(self, seen: Seen) -> Chosen:
        """Each prompt's own neurons or its group's."""
        groups, config = seen.groups, seen.params.config
        sums, counted = by_set(self, seen)
        narrowed = self.narrowed_layers(config.num_layers)
        own, figures = self._own_and_figures(seen.params, [sums[l] for l in narrowed])
        whole = {l: {"votes": layer["whole"].counts, "total": layer["whole"].sums} for l, layer in sums.items()}
        assigned = None if groups is None else self._assigned(whole, groups)
        found = [None] * len(counted) if assigned is None else np.asarray(assigned).tolist()
        choices = tuple(map(self._choice, counted.tolist(), np.asarray(figures).tolist(), found))
        by_group = np.array([choice.method == "similarity" for choice in choices])
        if groups is not None and assigned is not None and by_group.all():
            return _of_assigned(self, seen, assigned, choices)
        offsets: list[Any] = []
        if self.of_ratio(self.beta, seen.params)[1]:
            ranked = [seen.ranked[l][1] for l in narrowed if l in seen.ranked]
            offsets = ranked or constants_written(seen.params, narrowed, own)
        if groups is not None and assigned is not None and by_group.any():
            own, offsets = _mixed((own, offsets), (groups.tables, groups.offsets), assigned, by_group)
        return to_gather(narrowed, own, offsets, seen.params, choices, bool(offsets))

    def rank_layer(self, seen: Seen, l: int) -> Ranked | None:
        """The prompt's own neurons, where linear ones stand beside them."""
        narrowed = self.narrowed_layers(seen.params.config.num_layers)
        if l not in narrowed or not self.of_ratio(self.beta, seen.params)[1]:
            return None
        sums, _ = by_set(self, seen)
        indices, _ = self._own_and_figures(seen.params, [sums[l]])
        return indices[0], constants_written(seen.params, (l,), indices)[0]

    def _own_and_figures(self, params: Params, sums: list[dict[str, Tally]]) -> tuple[list[Array], Array]:
        kept, _ = self.of_ratio(self.beta, params)
        return _own_and_figures(sums, kept=kept, shards=self.shards_of(params), mesh=params.mesh)

    def _choice(self, counted: int, figure: float, group: int | None) -> Choice:
        if counted < self.least_tokens:
            reason = f"unstable: {counted} voting token{'' if counted == 1 else 's'}, fewer than {self.least_tokens}"
        elif np.float32(figure) < np.float32(self.least_stability):
            reason = f"unstable: stability {figure:.3f} is below {self.least_stability:g}"
        else:
            reason = f"stable: stability {figure:.3f} is at least {self.least_stability:g}, {counted} voting tokens"
            return Choice("stability", reason, figure, group)
        if group is None:
            return Choice("stability", f"{reason}; no groups were given to choose from", figure, None)
        return Choice("similarity", reason, figure, group)


def prepare_groups(params: Params, clusters: Clusters, core: GroupChooser, *, compacted: bool = True) -> Groups:
    """Make `clusters` ready to generate with.

    Args:
        params: dense weights of the model the clusters belong to.
        clusters: from `load_clusters` or `build_clusters`.
        core: the way of choosing to generate with, a `Similarity`, `Fused` or `Auto`.
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
    if not isinstance(core, GroupChooser):
        raise CoreInferError(f"core={shown(core)}: give the Similarity, Fused or Auto to generate with")
    clusters.check(params)
    core.check_votes(clusters)
    if compacted:
        check_on_device(params, "prepare_groups with compacted=True")
    narrowed, shards = core.narrowed_layers(params.config.num_layers), core.shards_of(params)
    kept, linear = core.of_ratio(core.group_ratio, params)
    share = kept_neurons(core.group_ratio, params.config.mlp_size, shards)
    sets = clusters.sets(core.group_ratio, narrowed, shards, share - kept)
    tables = [jnp.stack([jnp.asarray(chosen.layers[l]) for chosen in sets]) for l in narrowed]
    groups = Groups(
        params=params,
        clusters=clusters,
        gamma=core.group_ratio,
        layers=core.layers,
        sets=sets,
        narrowed=(),
        centroids=jnp.asarray(clusters.centroids),
        tables=tables,
        frequencies=[jnp.asarray(clusters.frequencies[:, l]) for l in narrowed],
        linear=linear,
    )
    return replace(groups, narrowed=tuple(compact(params, core) for core in groups.cores)) if compacted else groups


def _of_assigned(chooser: Chooser, seen: Seen, assigned: Array, choices: tuple[Choice, ...]) -> Chosen:
    """The neurons of each prompt's group `assigned` [R]; weights that are there already where one set serves all."""
    groups, config = seen.groups, seen.params.config
    assert groups is not None, "there is something to be assigned to"
    if len(choices) == 1 and groups.narrowed:
        group = int(assigned[0])
        return Chosen(groups.cores[group], None, groups.narrowed[group], choices)
    indices, offsets = _looked_up((groups.tables, groups.offsets), assigned)
    narrowed = chooser.narrowed_layers(config.num_layers)
    return to_gather(narrowed, indices, offsets, seen.params, choices, groups.linear)


def _alike(chooser: Chooser, ratio: float, params: Params) -> tuple[int, ...]:
    """The same number of neurons in every narrowed layer, 0 in the others."""
    L, kept = params.config.num_layers, kept_neurons(ratio, params.config.mlp_size, chooser.shards_of(params))
    narrowed = chooser.narrowed_layers(L)
    return tuple(kept if l in narrowed else 0 for l in range(L))


def _of_groups(
    chooser: Chooser, ratio: float, params: Params, groups: Groups | None, rows: int
) -> tuple[tuple[int, ...], int]:
    sets = chooser.sets(rows)
    there = groups is not None and bool(groups.narrowed) and sets == 1
    return (0,) * params.config.num_layers if there else _alike(chooser, ratio, params), sets


@partial(jax.jit, static_argnames=("kept", "mesh"))
def _nearest(sums: Sums, centroids: Array, *, kept: int, mesh: Mesh | None) -> Array:
    nearest: Array = constrained(nearest_group(Tally(sums["votes"], sums["total"]), kept, centroids), mesh)
    return nearest


@partial(jax.jit, static_argnames=("kept", "shards", "mesh"))
def _own_and_figures(
    sums: list[dict[str, Tally]], *, kept: int, shards: int, mesh: Mesh | None
) -> tuple[list[Array], Array]:
    """The most voted neurons [R, K] of each layer, and stability figures [R]."""
    own = [most_voted(layer["whole"], kept, shards) for layer in sums]
    return own, constrained(stability_figure([layer["early"] for layer in sums], own, shards), mesh)


@partial(jax.jit, static_argnames=("kept", "shards"))
def _fused(
    sums: list[Sums], frequencies: list[Array], assigned: Array, group_tokens: Array, *, kept: int, shards: int
) -> list[Array]:
    return [
        most_voted(fused(Tally(own["votes"], own["total"]), group[assigned], group_tokens), kept, shards)
        for own, group in zip(sums, frequencies, strict=True)
    ]


# Of each layer, neurons and offsets: [R, K] and [R, D], or of groups [C, K] and [C, D]; no offsets without linear ones.
_OfLayers = tuple[list[Array], list[Array]]


@jax.jit
def _looked_up(of_groups: _OfLayers, assigned: Array) -> _OfLayers:
    found: _OfLayers = jax.tree.map(lambda table: table[assigned], of_groups)
    return found


@jax.jit
def _mixed(own: _OfLayers, of_groups: _OfLayers, assigned: Array, by_group: Array) -> _OfLayers:
    mixed: _OfLayers = jax.tree.map(
        lambda mine, table: jnp.where(by_group[:, None], table[assigned], mine), own, of_groups
    )
    return mixed


@jax.jit
def _of_groups_ranked(ranked: list[tuple[Array, Array]], assigned: Array) -> _OfLayers:
    """Of neurons and offsets with each of the groups, [R, C, K] and [R, C, D], those with the assigned ones."""
    places = jnp.arange(len(assigned)), assigned
    return [indices[places] for indices, _ in ranked], [offset[places] for _, offset in ranked]
