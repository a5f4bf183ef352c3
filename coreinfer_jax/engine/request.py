"""A call to generate, checked: what is read, how core neurons are chosen, and whether there is room for it."""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from coreinfer_jax.device import check_memory
from coreinfer_jax.engine.prompts import Prompts, Tokens, check_length, pad_prompts
from coreinfer_jax.engine.sampling import Sampling
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.cache import KVCache, bucket, cache_bytes
from coreinfer_jax.model.config import CoreConfig
from coreinfer_jax.model.weights import Calibration, Params
from coreinfer_jax.sparsity.allocate import allocate
from coreinfer_jax.sparsity.choosers import check_groups, counted_tokens, early_tokens, voted_layers
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.narrow import narrowed_bytes
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.rules import Sums
from coreinfer_jax.sparsity.votes import Voting, kept_neurons, make_voting

Core = CoreConfig | CoreNeurons | None
# What a model's calibration found, or `CoreConfig()` where there is none.
Recommended = Literal["recommended"]


@dataclass(frozen=True)
class Past:
    """What the full model has read of every row, to go on from. Its arrays are donated when a request does.

    Attributes:
        cache: keys and values in slots 0 .. read - 1; what decode steps wrote after them will be overwritten.
        sums: of each voted layer, over the tokens read.
        read: tokens read, the same number in every row.
    """

    cache: KVCache
    sums: list[Sums]
    read: int

    @property
    def is_alive(self) -> bool:
        """Whether its arrays are still there."""
        return not any(array.is_deleted() for array in jax.tree.leaves((self.cache, self.sums)))


@dataclass(frozen=True)
class Request:
    """A checked call.

    Attributes:
        params: dense weights.
        calibration: what is known of their neurons, or None.
        prompts: what is to be read.
        core: how core neurons are chosen, or which, or None.
        groups: groups of texts to choose them by, or None.
        voted: the layers whose activations are summed up; () when nothing is chosen.
        voting: which tokens count, and how they vote; None when nothing is chosen.
        voters: int [B], how many tokens of the prompts count.
        sampling: how tokens are drawn.
        max_new_tokens: per row.
        past: what the full model has read of the rows before; None for nothing.
    """

    params: Params
    calibration: Calibration | None
    prompts: Prompts
    core: Core
    groups: Groups | None
    voted: tuple[int, ...]
    voting: Voting | None
    voters: np.ndarray
    sampling: Sampling
    max_new_tokens: int
    past: Past | None

    @property
    def cached(self) -> int:
        """Tokens per row that were read before."""
        return self.past.read if self.past else 0

    @property
    def capacity(self) -> int:
        """Positions per row that the cache has room for."""
        return bucket(self.cached + int(self.prompts.lengths.max()) + self.max_new_tokens)

    @property
    def added_bytes(self) -> int:
        """Bytes of the cache and of narrowed weights that the call makes: at least so many."""
        rows, config = len(self.prompts.lengths), self.params.config
        cache = cache_bytes(config, rows, self.capacity, self.params.token_embedding.dtype)
        had = 0 if self.past is None or self.past.cache.capacity < self.capacity else cache
        return cache - had + self._narrowed_bytes(rows)

    def _narrowed_bytes(self, rows: int) -> int:
        core, config = self.core, self.params.config
        if isinstance(core, CoreNeurons):
            kept = [0 if indices is None else indices.shape[-1] for indices in core.layers]
            return sum(narrowed_bytes(self.params, (l,), width, core.rows or 1) for l, width in enumerate(kept))
        if core is None:
            return 0
        sets = rows if core.per_row else 1
        groups = self.groups if core.method in ("similarity", "auto") else None
        if groups is not None and groups.narrowed and sets == 1:
            return 0  # the group's weights are there already
        if core.method == "stability":
            allocated = allocate(core, config, None if self.calibration is None else self.calibration.gains)
            kept = [0 if width == config.mlp_size else width for width in allocated]
            return sum(narrowed_bytes(self.params, (l,), width, sets) for l, width in enumerate(kept))
        ratio = core.beta if groups is None else min(core.beta, core.group_ratio)
        layers = core.narrowed_layers(config.num_layers)
        return narrowed_bytes(self.params, layers, kept_neurons(ratio, config.mlp_size), sets)


def make_request(
    params: Params,
    tokens: Tokens,
    core: Core | Recommended,
    groups: Groups | None,
    max_new_tokens: int,
    sampling: Sampling,
    past: Past | None = None,
) -> Request:
    """Check everything, so that mistakes surface at the call and not when the first chunk is asked for."""
    prompts = pad_prompts(tokens, params.config)
    cached = past.read if past else 0
    check_length(cached + int(prompts.lengths.max()), max_new_tokens, params.config)
    return request_of(params, prompts, resolved(params, core), groups, max_new_tokens, sampling, past)


def request_of(
    params: Params,
    prompts: Prompts,
    core: Core,
    groups: Groups | None,
    max_new_tokens: int,
    sampling: Sampling,
    past: Past | None = None,
) -> Request:
    """The request for prompts that fit, with room for 0 or more new tokens after the longest; all else is checked."""
    cached = past.read if past else 0
    if isinstance(core, CoreNeurons):
        core.check(params.config)
        core.check_rows(len(prompts.lengths))
    if isinstance(core, CoreConfig):
        check_groups(core, groups, params, len(prompts.lengths))
    elif groups is not None:
        raise CoreInferError(f"groups need a CoreConfig that uses them, but core={shown(core)}; leave groups out")
    voted, voting, voters = _voting(params, prompts, core, groups, cached)
    request = Request(
        params.weights,
        params.calibration,
        prompts,
        core,
        groups,
        voted,
        voting,
        voters,
        sampling,
        int(max_new_tokens),
        past,
    )
    check_memory(
        request.added_bytes,
        f"a cache of {request.capacity} positions and narrowed weights for {len(prompts.lengths)} rows",
        f"ask for fewer rows or tokens{'' if core is None else ', or fewer core neurons'}",
    )
    return request


def resolved(params: Params, core: Core | Recommended) -> Core:
    """`core`, or what is recommended for `params`.

    Raises:
        CoreInferError: something else.
    """
    if isinstance(core, str) and core == "recommended":
        return CoreConfig() if params.calibration is None else params.calibration.core
    if core is not None and not isinstance(core, CoreConfig | CoreNeurons):
        raise CoreInferError(
            f"core={shown(core)}: give CoreConfig, CoreNeurons, None for all neurons, or 'recommended'"
        )
    return core


def check_alive(past: Past) -> None:
    """Refuse a past whose memory another request was given."""
    if not past.is_alive:
        raise CoreInferError(
            "conversation: another turn has gone on from it; give the latest, or None to read all again"
        )


def _voting(
    params: Params, prompts: Prompts, core: Core, groups: Groups | None, cached: int
) -> tuple[tuple[int, ...], Voting | None, np.ndarray]:
    """The layers to sum up, which tokens count and how they vote, how many do; nothing where nothing is chosen."""
    if not isinstance(core, CoreConfig):
        return (), None, np.zeros(len(prompts.lengths), np.int64)
    counted = counted_tokens(core, prompts.tokens, prompts.lengths, cached, params.config)
    early = early_tokens(counted) if core.method == "auto" else None
    voting = make_voting(counted, params.config.mlp_size, core.alpha, core.budget, early)
    return voted_layers(core, params.config, groups), voting, counted.sum(axis=1)
