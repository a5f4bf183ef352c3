"""Predicting core neurons from sums over a prompt: who counts, and the neurons each layer keeps (paper, section 3.3).

Everything a prediction needs comes out of the one ordinary prefill.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.config import PRIOR_RULE, CoreConfig, ModelConfig
from coreinfer_jax.model.weights import Calibration, Params
from coreinfer_jax.sparsity.allocate import allocate
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.measures import fused, nearest_group, stability_figure
from coreinfer_jax.sparsity.narrow import Indices, Offsets, narrow, narrowed_shapes, on_device
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.ranking import rank
from coreinfer_jax.sparsity.rules import Sums, votes_of
from coreinfer_jax.sparsity.votes import Votes, kept_neurons, most_voted

# The reason of a choice that the caller made.
ASKED = "asked for"


@dataclass(frozen=True)
class Choice:
    """How the core neurons of one row, or of all rows together, were found.

    Attributes:
        method: what ran.
        reason: why, in words.
        stability: the prompt's stability figure, where `auto` measured it.
        group: the group it was assigned to, where there are any.
    """

    method: Literal["dense", "given", "stability", "similarity", "fused"]
    reason: str
    stability: float | None = None
    group: int | None = None


@dataclass(frozen=True)
class Predicted:
    """Core neurons and how they were found; one choice per set.

    Attributes:
        core: the sets, None for the full model.
        kept: the same on the device, None where the weights need no gather.
        narrowed: the full model, or a group's weights that were gathered before; otherwise None.
        choices: one per row, or a single one for all rows.
    """

    core: CoreNeurons | None
    kept: tuple[Indices, Offsets] | None
    narrowed: Params | None
    choices: tuple[Choice, ...]

    def weights(self, params: Params) -> Params:
        """The weights to decode with, from dense `params`; the gather is started, not awaited."""
        return self._made(params, narrow)

    def shapes(self, params: Params) -> Params:
        """What `weights` returns, of narrowed arrays only shapes and types."""
        return self._made(params, narrowed_shapes)

    def _made(self, params: Params, make: Callable[[Params, Indices, Offsets], Params]) -> Params:
        if self.narrowed is not None:
            return self.narrowed
        assert self.kept is not None, "there is something to gather where nothing is ready"
        return make(params, *self.kept)


def voted_layers(core: CoreConfig, config: ModelConfig, groups: Groups | None) -> tuple[int, ...]:
    """The layers whose sums a prediction needs, ascending."""
    own = () if core.method == "similarity" else core.narrowed_layers(config.num_layers)
    return tuple(sorted({*own, groups.clusters.layer} if groups else own))


def check_groups(core: CoreConfig, groups: object, params: Params, rows: int) -> None:
    """Refuse groups that are missing, do not fit, or would not be used."""
    if groups is None:
        if core.method in ("similarity", "fused"):
            raise CoreInferError(f"method={core.method!r} needs groups: give those of prepare_groups")
        return
    if not isinstance(groups, Groups):
        raise CoreInferError(f"groups={shown(groups)}: give what prepare_groups returns")
    if core.method == "stability":
        raise CoreInferError("groups are not used by method='stability'; choose 'similarity', 'fused' or 'auto'")
    groups.check(params, core)
    F = params.config.mlp_size
    own, group = kept_neurons(core.beta, F), kept_neurons(core.group_ratio, F)
    if core.method == "auto" and core.per_row and rows > 1 and own != group:
        raise CoreInferError(
            f"beta={core.beta} keeps {own} neurons and gamma={core.gamma} {group}: rows of one batch need the same "
            "number; give equal ratios, one row at a time, or per_row=False"
        )


def counted_tokens(
    core: CoreConfig, tokens: np.ndarray, lengths: np.ndarray, cached: int, config: ModelConfig
) -> np.ndarray:
    """Which of tokens [B, T] count: bool [B, T], not padding, and not a leading BOS where the setting excludes it.

    Args:
        core: the setting.
        tokens: padded rows.
        lengths: int32 [B], tokens per row before padding.
        cached: tokens per row that were read, and counted, before.
        config: the model.

    Raises:
        CoreInferError: a row without any.
    """
    counted = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
    if not core.count_bos and config.bos_id is not None and not cached:
        counted[:, 0] &= tokens[:, 0] != config.bos_id
    if not counted.any(axis=1).all():
        raise CoreInferError("a prompt of BOS alone has no token to choose by with count_bos=False: lengthen it")
    return counted


def early_tokens(counted: np.ndarray) -> np.ndarray:
    """The first half of each row's counted tokens, rounded down: bool [B, T] of `counted` bool [B, T]."""
    return counted & (np.cumsum(counted, axis=1) <= counted.sum(axis=1, keepdims=True) // 2)


def all_neurons(params: Params) -> Predicted:
    """The full model."""
    return Predicted(None, None, params, (Choice("dense", ASKED),))


def given(core: CoreNeurons) -> Predicted:
    """What the caller chose, a single row's set as a shared one."""
    kept = jax.block_until_ready(on_device(core.row(0) if core.rows == 1 else core))
    return Predicted(core, kept, None, (Choice("given", ASKED),))


def predict(
    core: CoreConfig,
    sums: Mapping[int, Sums],
    voters: np.ndarray,
    params: Params,
    groups: Groups | None,
    calibration: Calibration | None,
) -> Predicted:
    """Core neurons by the method that `core` names.

    Args:
        core: how to choose.
        sums: of each of the `voted_layers`, over B prompts, by the rule that `core` names.
        voters: int [B], tokens that counted per row.
        params: dense weights.
        groups: checked by `check_groups`; None where there are none.
        calibration: what is known of the model's neurons; None for nothing.
    """
    if not core.per_row and len(voters) > 1:
        sums, voters = _pooled(sums), voters.min(keepdims=True)
    if core.method == "stability":
        return _by_rule(core, sums, params, calibration, rows=len(voters))
    return _by_votes(core, {l: votes_of(own) for l, own in sums.items()}, voters, params.config, groups)


def _by_rule(
    core: CoreConfig, sums: Mapping[int, Sums], params: Params, calibration: Calibration | None, rows: int
) -> Predicted:
    """The neurons that the prompt itself ranks highest, the others at a share of their mean."""
    config = params.config
    kept = allocate(core, config, None if calibration is None else calibration.gains)
    # A layer that keeps all is read as it is.
    narrowed = tuple(l for l in core.narrowed_layers(config.num_layers) if kept[l] < config.mlp_size)
    # A calibration's sums are those of one rule.
    known = calibration is not None and core.ranking == PRIOR_RULE and core.prior_tokens > 0
    indices, offsets = rank(
        [sums[l] for l in narrowed],
        [calibration.prior[l] for l in narrowed] if calibration is not None and known else None,
        [params.layers[l].mlp.down.weight for l in narrowed],
        np.float32(core.prior_tokens),
        np.float32(core.compensation),
        rule=core.ranking,
        kept=tuple(kept[l] for l in narrowed),
        compensated=core.compensation > 0,
    )
    return _gathered(indices, offsets, narrowed, config, (Choice("stability", ASKED),) * rows)


def _by_votes(
    core: CoreConfig, votes: Mapping[int, Votes], voters: np.ndarray, config: ModelConfig, groups: Groups | None
) -> Predicted:
    """The most voted neurons, of the prompt or its group."""
    narrowed = core.narrowed_layers(config.num_layers)
    own, figures, assigned = _measure(
        [votes[l] for l in narrowed if l in votes],
        None if groups is None else votes[groups.clusters.layer],
        None if groups is None else (groups.centroids, groups.frequencies),
        np.float32(core.group_tokens),
        method=core.method,
        kept=kept_neurons(core.beta, config.mlp_size),
        vector=0 if groups is None else kept_neurons(groups.clusters.core.beta, config.mlp_size),
    )
    choices = _choices(core, voters, figures, assigned)
    by_group = np.array([choice.method == "similarity" for choice in choices])
    none = [None] * len(narrowed)
    if groups is None or not by_group.any():
        return _gathered(own, none, narrowed, config, choices)
    if len(choices) == 1 and groups.narrowed:
        group = int(assigned[0])
        return Predicted(groups.sets[group], None, groups.narrowed[group], choices)
    if by_group.all():
        return _gathered(_looked_up(groups.tables, assigned), none, narrowed, config, choices)
    return _gathered(_mixed(own, groups.tables, assigned, by_group), none, narrowed, config, choices)


def _gathered(
    indices: list[Array],
    offsets: Sequence[Array | None],
    narrowed: tuple[int, ...],
    config: ModelConfig,
    choices: tuple[Choice, ...],
) -> Predicted:
    """What is to be gathered: index arrays [R, K] and offsets of the narrowed layers, a single set as a shared one."""

    def per_layer(arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
        # A shared set runs the plain program.
        shared = [a[0] if a is not None and len(choices) == 1 else a for a in arrays]
        by_layer = dict(zip(narrowed, shared, strict=True))
        return tuple(by_layer.get(l) for l in range(config.num_layers))

    kept = jax.block_until_ready((per_layer(indices), per_layer(offsets)))
    return Predicted(CoreNeurons(*kept), kept, None, choices)


def _choices(core: CoreConfig, voters: np.ndarray, figures: Array | None, assigned: Array | None) -> tuple[Choice, ...]:
    """What each of the R sets is taken from, and why."""
    stability = [None] * len(voters) if figures is None else np.asarray(figures).tolist()
    group = [None] * len(voters) if assigned is None else np.asarray(assigned).tolist()
    if core.method != "auto":
        return tuple(Choice(core.method, ASKED, None, c) for c in group)
    return tuple(_automatic(core, int(n), figure, c) for n, figure, c in zip(voters, stability, group, strict=True))


def _automatic(core: CoreConfig, voters: int, figure: float, group: int | None) -> Choice:
    """Stability for a stable prompt; for others similarity, or stability again where there are no groups."""
    if voters < core.least_tokens:
        reason = f"unstable: {voters} voting token{'' if voters == 1 else 's'}, fewer than {core.least_tokens}"
    elif np.float32(figure) < np.float32(core.least_stability):
        reason = f"unstable: stability {figure:.3f} is below {core.least_stability:g}"
    else:
        reason = f"stable: stability {figure:.3f} is at least {core.least_stability:g}, {voters} voting tokens"
        return Choice("stability", reason, figure, group)
    if group is None:
        return Choice("stability", f"{reason}; no groups were given to choose from", figure, None)
    return Choice("similarity", reason, figure, group)


@jax.jit
def _pooled(sums: dict[int, Sums]) -> dict[int, Sums]:
    """The sums of all rows together, as those of one."""
    return {l: jax.tree.map(lambda array: array.sum(axis=0, keepdims=True), layer) for l, layer in sums.items()}


@partial(jax.jit, static_argnames=("method", "kept", "vector"))
def _measure(
    votes: list[Votes],
    deciding: Votes | None,
    groups: tuple[Array, list[Array]] | None,
    group_tokens: Array,
    *,
    method: str,
    kept: int,
    vector: int,
) -> tuple[list[Array], Array | None, Array | None]:
    """Indices [R, K] per layer of `votes`, stability figures [R] (of `auto`), groups [R] (where there are any)."""
    assigned = None
    if groups is not None and deciding is not None:
        centroids, frequencies = groups
        assigned = nearest_group(deciding, vector, centroids)
        if method == "similarity":
            return [], None, assigned
        if method == "fused":
            votes = [fused(own, group[assigned], group_tokens) for own, group in zip(votes, frequencies, strict=True)]
    own = [most_voted(layer, kept) for layer in votes]
    return own, stability_figure(votes, own) if method == "auto" else None, assigned


@jax.jit
def _looked_up(tables: list[Array], assigned: Array) -> list[Array]:
    return [table[assigned] for table in tables]


@jax.jit
def _mixed(own: list[Array], tables: list[Array], assigned: Array, by_group: Array) -> list[Array]:
    return [jnp.where(by_group[:, None], table[assigned], mine) for mine, table in zip(own, tables, strict=True)]
