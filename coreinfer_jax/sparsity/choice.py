"""What a way of choosing core neurons is: what it observes of a prefill, and what it makes of that.

`Chooser` is the seam between the engine, which only calls it, and the ways of choosing, which stand in `choosers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from coreinfer_jax.checks import check_flag, check_whole
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.host import is_on_host
from coreinfer_jax.model.shards import constrained
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.allocate import Narrowing
from coreinfer_jax.sparsity.calibration import Explained, explained_by
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.moving import NOTHING, DeviceRows, narrow_from_host
from coreinfer_jax.sparsity.narrow import (
    Indices,
    Offsets,
    check_linear,
    linear_worth,
    narrow,
    narrowed_shapes,
    on_device,
)
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.rules import Observer

Method = Literal["dense", "given", "stability", "similarity", "fused"]
# The reason of a choice that the caller made.
ASKED = "asked for"


@dataclass(frozen=True)
class Choice:
    """How the core neurons of one row, or of all rows together, were found.

    Attributes:
        method: what ran.
        reason: why, in words.
        stability: the prompt's stability figure, where `Auto` measured it.
        group: the group it was assigned to, where there are any.
    """

    method: Method
    reason: str = ASKED
    stability: float | None = None
    group: int | None = None


@dataclass(frozen=True)
class ToNarrow:
    """What the weights will be narrowed to, as far as it is known before a prompt is read: all but which neurons.

    Attributes:
        kept: per layer, neurons gathered; None where it stays dense.
        sets: how many core sets there are.
        offsets: per layer, whether something is added to the output for all others.
        linear: per layer, whether linear neurons stand beside them.
    """

    kept: tuple[int | None, ...]
    sets: int
    offsets: tuple[bool, ...]
    linear: tuple[bool, ...]


# The best neurons of a layer [R, K], and what is added to the MLP's output for all others: [R, D], or None for nothing.
Ranked = tuple[Array, Array | None]


@dataclass(frozen=True)
class Seen:
    """What there is to choose from after a prefill.

    Attributes:
        params: dense weights, with what is known of their neurons.
        groups: groups of texts, or None.
        sums: of each observed layer, over B prompts.
        counted: int [B], tokens that counted per row.
        narrowing: what the chooser's `to_narrow` said.
        ranked: of layers whose weights are not at hand any more, what `Choosing.rank_layer` made of them.
    """

    params: Params
    groups: Groups | None
    sums: Mapping[int, Any]
    counted: np.ndarray
    narrowing: ToNarrow
    ranked: Mapping[int, Ranked] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """Core neurons and how they were found; one choice per set.

    Attributes:
        core: the sets, None for the full model.
        arrays: the same on the device, None where the weights need no gather.
        ready: the full model, or a group's weights that were gathered before; otherwise None.
        choices: one per row, or a single one for all rows.
    """

    core: CoreNeurons | None
    arrays: tuple[Indices, Offsets] | None
    ready: Params | None
    choices: tuple[Choice, ...]

    @property
    def indices(self) -> Indices | None:
        """Per layer, the neurons to gather; None where no layer has any."""
        return self.arrays[0] if self.arrays is not None and any(own is not None for own in self.arrays[0]) else None

    def kept(self, config: ModelConfig) -> tuple[int, ...]:
        """Neurons kept per layer, F where a layer stays dense."""
        return (config.mlp_size,) * config.num_layers if self.core is None else self.core.kept(config.mlp_size)

    def weights(self, params: Params, earlier: DeviceRows = NOTHING) -> Params:
        """The weights to decode with, from dense `params`; the gather is started, not awaited.

        Where MLPs stay on the host, only what `earlier` does not hold is moved, and that is awaited. Where no layer is
        narrowed, nothing is.
        """
        if is_on_host(params) and self.indices is None:
            return params.weights
        return self._made(params, partial(narrow_from_host, earlier=earlier) if is_on_host(params) else narrow)

    def shapes(self, params: Params) -> Params:
        """What `weights` returns, of narrowed arrays only shapes and types."""
        return self._made(params, narrowed_shapes)

    def _made(self, params: Params, make: Callable[..., Params]) -> Params:
        if self.ready is not None:
            return self.ready
        assert self.arrays is not None, "there is something to gather where nothing is ready"
        assert self.core is not None, "there are numbers of what is gathered"
        return make(params, *self.arrays, self.core.linear)


class Choosing(ABC):
    """A way of choosing core neurons; as it stands here it observes nothing."""

    @property
    def adds_up(self) -> bool:
        """Whether sums over the parts of a conversation are all that it needs."""
        return True

    @abstractmethod
    def check(self, params: Params, groups: Groups | None, rows: int) -> None:
        """Refuse a model, groups or a number of rows (B) that it cannot choose for."""

    def observed_layers(self, config: ModelConfig, groups: Groups | None) -> tuple[int, ...]:
        """The layers whose sums it needs, ascending."""
        return ()

    def counted(self, tokens: np.ndarray, lengths: np.ndarray, cached: int, config: ModelConfig) -> np.ndarray:
        """Which of tokens [B, T] it observes: bool [B, T]; arguments are those of `counted_tokens`."""
        return np.zeros(tokens.shape, bool)

    def observer(self, counted: np.ndarray, params: Params) -> Observer | None:
        """What it observes of `params` over the tokens `counted` bool [B, T]; None for nothing."""
        return None

    def gathered(self, params: Params, groups: Groups | None, rows: int) -> tuple[tuple[int, ...], int]:
        """What its weights will take at least: neurons gathered per layer, 0 where none are, and how many sets."""
        return (0,) * params.config.num_layers, 1

    def to_narrow(self, params: Params, groups: Groups | None, rows: int) -> ToNarrow:
        """What its weights will be, of the most neurons where a prompt decides on their number."""
        kept, sets = self.gathered(params, groups, rows)
        nowhere = (False,) * params.config.num_layers
        return ToNarrow(tuple(neurons or None for neurons in kept), sets, nowhere, nowhere)

    def rank_layer(self, seen: Seen, l: int) -> Ranked | None:
        """What `choose` needs the weights of layer `l` for, where they come and go; None for nothing.

        Of `seen` the sums of that layer are there, and in the params its weights.
        """
        return None

    @abstractmethod
    def choose(self, seen: Seen) -> Chosen:
        """Core neurons of what was seen."""


def _refuse_groups(groups: object, what: str) -> None:
    if groups is not None:
        raise CoreInferError(f"groups are not used by {what}: leave groups out, or take Similarity, Fused or Auto")


@dataclass(frozen=True)
class AllNeurons(Choosing):
    """The full model.

    Attributes:
        reason: why, in words.
    """

    reason: str = ASKED

    def check(self, params: Params, groups: Groups | None, rows: int) -> None:
        """Refuse groups."""
        _refuse_groups(groups, "core=None")

    def choose(self, seen: Seen) -> Chosen:
        """All neurons."""
        return Chosen(None, None, seen.params.weights, (Choice("dense", self.reason),))


@dataclass(frozen=True)
class GivenNeurons(Choosing):
    """What the caller chose."""

    neurons: CoreNeurons

    def check(self, params: Params, groups: Groups | None, rows: int) -> None:
        """Refuse neurons of another model or another number of rows, and groups."""
        _refuse_groups(groups, "CoreNeurons")
        self.neurons.check(params.config)
        self.neurons.check_rows(rows)
        check_linear(params, self.neurons.linear)

    def gathered(self, params: Params, groups: Groups | None, rows: int) -> tuple[tuple[int, ...], int]:
        """The neurons' numbers."""
        widths = (0 if indices is None else indices.shape[-1] for indices in self.neurons.layers)
        worth = linear_worth(params)
        beside = zip(widths, self.neurons.linear, strict=True)
        return tuple(width + worth if linear else width for width, linear in beside), self.neurons.rows or 1

    def to_narrow(self, params: Params, groups: Groups | None, rows: int) -> ToNarrow:
        """The neurons' numbers, without those that linear ones cost."""
        kept = tuple(None if own is None else own.shape[-1] for own in self.neurons.layers)
        offsets = tuple(offset is not None for offset in self.neurons.offsets)
        return ToNarrow(kept, self.neurons.rows or 1, offsets, self.neurons.linear)

    def choose(self, seen: Seen) -> Chosen:
        """The neurons; a single row's set is a shared one."""
        shared = self.neurons.row(0) if self.neurons.rows == 1 else self.neurons
        return Chosen(self.neurons, jax.block_until_ready(on_device(seen.params, shared)), None, (Choice("given"),))


@dataclass(frozen=True, kw_only=True)
class Chooser(Narrowing, Choosing):
    """What all ways of choosing from prompts have.

    Attributes:
        layers: which layers are narrowed, as fractions of depth: layer l of L when layers[0] <= l / L < layers[1].
        per_row: choose one core set per row of a batch, so that each row equals its single run; every row then
            reads its own narrowed weights. False chooses one set for all rows together: the narrowed weights are
            read once per step for the whole batch.
        count_bos: whether a beginning-of-sequence token at the start of the prompt counts, as in the paper.
        linear: whether linear neurons stand for those that are not kept, where the model's calibration has them. A
            layer that gets no larger a share of its neurons than the calibration found them to be worth, and more than
            they cost, then keeps so many fewer that it reads no more bytes.
        shards: into how many equal parts each layer's neurons are cut, of which each keeps its own best K / shards. 1
            means as many as the model is spread over; on one device more than 1 shows what that costs.
        method: how results name it.
    """

    per_row: bool = True
    count_bos: bool = True
    linear: bool = True
    shards: int = 1
    method: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("per_row", self.per_row)
        check_flag("count_bos", self.count_bos)
        check_flag("linear", self.linear)
        check_whole("shards", self.shards, 1)

    def shards_of(self, params: Params) -> int:
        """How many equal parts of a layer's neurons keep their own.

        Raises:
            CoreInferError: the neurons cannot be cut so, or are spread over another number of devices.
        """
        if params.mesh is not None and self.shards not in (1, params.shards):
            raise CoreInferError(
                f"shards={self.shards}: the model is spread over {params.shards} devices, each of which keeps its own "
                "neurons; leave it out"
            )
        n = self.shards if params.mesh is None else params.shards
        if params.config.mlp_size % n:
            raise CoreInferError(
                f"shards={n}: does not divide the model's {params.config.mlp_size} neurons per layer; give a divisor"
            )
        return n

    def of_shards(self, kept: int, params: Params) -> int:
        """As many of `kept` neurons as all shards have an equal number of, at least one each."""
        n = self.shards_of(params)
        return n * max(1, kept // n)

    def explained(self, params: Params) -> Explained | None:
        """What is known of a model's linear neurons, if they are wanted."""
        return explained_by(params) if self.linear else None

    def beside_linear(self, shares: tuple[int, ...], params: Params) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Of each layer's share of its neurons, how many are kept beside linear ones, and whether there are any."""
        known, F = self.explained(params), params.config.mlp_size
        if known is None:
            return tuple(self.of_shards(share, params) for share in shares), (False,) * len(shares)
        worth, most = linear_worth(params), min(known.up_to * F, F - 1)
        linear = tuple(worth < share <= most for share in shares)
        own = (share - worth * beside for share, beside in zip(shares, linear, strict=True))
        return tuple(self.of_shards(share, params) for share in own), linear

    def counted(self, tokens: np.ndarray, lengths: np.ndarray, cached: int, config: ModelConfig) -> np.ndarray:
        """All tokens of the prompts, but for a leading BOS where it does not count."""
        return counted_tokens(tokens, lengths, cached, config, count_bos=self.count_bos)

    def sets(self, rows: int) -> int:
        """How many core sets a batch of `rows` (B) rows has."""
        return rows if self.per_row else 1


def counted_tokens(
    tokens: np.ndarray, lengths: np.ndarray, cached: int, config: ModelConfig, *, count_bos: bool
) -> np.ndarray:
    """Which of tokens [B, T] count: bool [B, T], not padding, and not a leading BOS where that is left out.

    Args:
        tokens: padded rows.
        lengths: int32 [B], tokens per row before padding.
        cached: tokens per row that were read, and counted, before.
        config: the model.
        count_bos: whether a leading BOS counts.

    Raises:
        CoreInferError: a row without any.
    """
    counted = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
    if not count_bos and config.bos_id is not None and not cached:
        counted[:, 0] &= tokens[:, 0] != config.bos_id
    if not counted.any(axis=1).all():
        raise CoreInferError("a prompt of BOS alone has no token to choose by with count_bos=False: lengthen it")
    return counted


def by_set(chooser: Chooser, seen: Seen) -> tuple[Mapping[int, Any], np.ndarray]:
    """Sums and numbers of counted tokens per set: those of all rows as of one where rows share a set."""
    if chooser.per_row or len(seen.counted) == 1:
        return seen.sums, seen.counted
    return _pooled(dict(seen.sums)), seen.counted.min(keepdims=True)


@jax.jit
def _pooled(sums: dict[int, Any]) -> dict[int, Any]:
    return {l: jax.tree.map(lambda array: array.sum(axis=0, keepdims=True), layer) for l, layer in sums.items()}


def to_gather(
    narrowed: Sequence[int],
    indices: list[Array],
    offsets: Sequence[Array | None] | None,
    params: Params,
    choices: tuple[Choice, ...],
    linear: bool | tuple[bool, ...] = False,
) -> Chosen:
    """What is to be gathered: index arrays [R, K] and offsets of the narrowed layers, a single set as a shared one.

    `linear` says in which of all layers linear neurons stand beside them.
    """

    def per_layer(arrays: Sequence[Any]) -> tuple[Any, ...]:
        by_layer = dict(zip(narrowed, arrays, strict=True))
        return tuple(by_layer.get(l) for l in range(params.config.num_layers))

    # A shared set runs the plain program.
    arrays, flat = _handed_over(
        (indices, list(offsets or [None] * len(narrowed))), shared=len(choices) == 1, mesh=params.mesh
    )
    on_host = [_cut(one, layers) for one, layers in zip(jax.device_get(flat), arrays, strict=True)]
    kept, added = (per_layer(layers) for layers in on_host)
    core = CoreNeurons(kept, added, linear)
    return Chosen(core, (per_layer(arrays[0]), per_layer(arrays[1])), None, choices)


_OfLayers = list[Array | None]


@partial(jax.jit, static_argnames=("shared", "mesh"))
def _handed_over(
    arrays: tuple[_OfLayers, _OfLayers], *, shared: bool, mesh: Mesh | None
) -> tuple[tuple[_OfLayers, _OfLayers], tuple[Array | None, Array | None]]:
    """Indices and offsets per layer, where a set is `shared` without the leading axis; each also as one flat array.

    From a GPU it takes about as long to fetch one layer's array as those of all layers.
    """
    cut: tuple[_OfLayers, _OfLayers] = jax.tree.map(lambda array: array[0], arrays) if shared else arrays
    flat = [jax.tree.map(jnp.ravel, jax.tree.leaves(layers)) for layers in cut]
    return cut, constrained((_joined(flat[0]), _joined(flat[1])), mesh)


def _joined(arrays: list[Array]) -> Array | None:
    return jnp.concatenate(arrays) if arrays else None


def _cut(flat: np.ndarray | None, layers: _OfLayers) -> list[np.ndarray | None]:
    """Views of `flat`, which joins all arrays that there are of `layers`, in their shapes."""
    views: list[np.ndarray | None] = []
    start = 0
    for layer in layers:
        views.append(None if layer is None or flat is None else flat[start : start + layer.size].reshape(layer.shape))
        start += 0 if layer is None else layer.size
    return views
