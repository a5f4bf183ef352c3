"""A call to generate, checked: what is read, how core neurons are chosen, and whether there is memory for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from coreinfer_jax.device import check_memory
from coreinfer_jax.engine.drafting import LOOK_EVERY
from coreinfer_jax.engine.options import Drawing
from coreinfer_jax.engine.programs import prefill_bytes
from coreinfer_jax.engine.prompts import Prompts, without_first
from coreinfer_jax.engine.verification import watched_places
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.backends import draft_size
from coreinfer_jax.model.cache import KVCache, bucket, cache_bytes
from coreinfer_jax.model.host import is_on_host
from coreinfer_jax.model.shards import bytes_in_a_memory
from coreinfer_jax.model.weights import Layer, Params
from coreinfer_jax.sparsity.choice import Choosing, Ranked, Seen, ToNarrow
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.moving import NOTHING, DeviceRows, check_rows
from coreinfer_jax.sparsity.narrow import multiple_of, narrowed_bytes, padded_width
from coreinfer_jax.sparsity.rules import Observer


@dataclass(frozen=True)
class Past:
    """What the full model has read of every row, to go on from. Its arrays are donated when a request does.

    Attributes:
        cache: keys and values in slots 0 .. read - 1; what decode steps wrote after them will be overwritten.
        sums: of each observed layer, over the tokens read.
        read: tokens read, the same number in every row.
        device_rows: what is there of MLPs that stay on the host.
    """

    cache: KVCache
    sums: list[Any]
    read: int
    device_rows: DeviceRows = NOTHING

    @property
    def is_alive(self) -> bool:
        """Whether its arrays are still there."""
        arrays = jax.tree.leaves((self.cache, self.sums))
        return self.device_rows.is_alive and not any(array.is_deleted() for array in arrays)

    def check_alive(self) -> None:
        """Refuse a past whose memory another request was given."""
        if not self.is_alive:
            raise CoreInferError(
                "conversation: another turn has gone on from it; give the latest, or None to read all again"
            )

    def release(self) -> None:
        """Give back the memory of what was read; rows on the device stay."""
        for array in jax.tree.leaves((self.cache, self.sums)):
            array.delete()


@dataclass(frozen=True)
class Request:
    """A call.

    Attributes:
        params: dense weights, with what is known of their neurons.
        prompts: what is to be read.
        text: the whole prompts, what was read of them before included.
        chooser: how core neurons are chosen.
        groups: groups of texts to choose them by, or None.
        drawing: how tokens are drawn and where rows end.
        max_new_tokens: per row.
        past: what the full model has read of the rows before; None for nothing.
        counted: bool [B, T], which tokens of the prompts the chooser observes.
        device_rows: what earlier calls left of MLPs that stay on the host.
        lossless: whether core neurons only draft, and the full model decides.
        regather_at: lossless, the drift beyond which core neurons are gathered anew; None where they stay.
    """

    params: Params
    prompts: Prompts
    text: Prompts
    chooser: Choosing
    groups: Groups | None
    drawing: Drawing
    max_new_tokens: int
    past: Past | None
    counted: np.ndarray
    device_rows: DeviceRows = NOTHING
    lossless: bool = False
    regather_at: float | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.prompts.lengths)

    @property
    def cached(self) -> int:
        """Tokens per row that were read before."""
        return self.past.read if self.past else 0

    @property
    def capacity(self) -> int:
        """Positions per row that its cache needs."""
        return bucket(self.cached + int(self.prompts.lengths.max()) + self.max_new_tokens)

    @property
    def positions(self) -> int:
        """Positions per row of its cache (S): those that it needs, or those of its past's where that has more."""
        return max(self.capacity, 0 if self.past is None else self.past.cache.capacity)

    @property
    def looks_back(self) -> bool:
        """Whether decoding looks at the tokens of a row's text."""
        return self.drawing.penalises or self.lossless

    def history(self, capacity: int) -> np.ndarray:
        """The whole prompts, int32 [B, `capacity`], with room for the new tokens."""
        return np.pad(self.text.tokens, ((0, 0), (0, capacity - self.text.tokens.shape[1])))

    @property
    def observed(self) -> tuple[int, ...]:
        """The layers that it observes."""
        return self.chooser.observed_layers(self.params.config, self.groups)

    @property
    def regathers(self) -> bool:
        """Whether its core neurons follow its text.

        What observes nothing has no reason to choose anew, and what does not add up has not seen enough. Of MLPs that
        stay on the host, the weights that neurons are ranked by are not at hand.
        """
        asked = self.lossless and self.regather_at is not None and not is_on_host(self.params)
        is_long = self.max_new_tokens > LOOK_EVERY
        return asked and is_long and bool(self.observed) and self.chooser.adds_up

    @property
    def _regathering_bytes(self) -> int:
        """Bytes of what is watched of the observed layers' MLPs, for core neurons that follow the text."""
        config, params = self.params.config, self.params
        tokens = self.rows * watched_places(draft_size(params.token_embedding, self.rows, False))
        numbers = len(self.observed) * (config.hidden_size + config.mlp_size)
        return tokens * numbers * params.dtype.itemsize

    @cached_property
    def to_narrow(self) -> ToNarrow:
        """What its weights will be narrowed to."""
        return self.chooser.to_narrow(self.params, self.groups, self.rows)

    def seen(self, sums: Sequence[Any], ranked: Mapping[int, Ranked] = MappingProxyType({})) -> Seen:
        """What it chooses from, once there are `sums` of the observed layers."""
        by_layer = dict(zip(self.observed, sums, strict=True))
        return Seen(self.params, self.groups, by_layer, self.counted.sum(axis=1), self.to_narrow, ranked)

    def ranked(self, l: int, layer: Layer, sums: Any) -> Ranked | None:
        """What its chooser makes of a layer whose weights come and go."""
        layers = tuple(layer if own == l else other for own, other in enumerate(self.params.layers))
        there = replace(self.params, layers=layers)
        return self.chooser.rank_layer(Seen(there, self.groups, {l: sums}, self.counted.sum(axis=1), self.to_narrow), l)

    @cached_property
    def observer(self) -> Observer | None:
        """What the chooser observes of the prompts; None for nothing."""
        return self.chooser.observer(self.counted, self.params)

    @property
    def filled(self) -> int:
        """Positions that its prefill attends to, at least all that are filled then."""
        return min(self.positions, bucket(self.cached + self.prompts.tokens.shape[1]))

    @cached_property
    def gathered(self) -> tuple[tuple[int, ...], int]:
        """What its weights will take at least: neurons gathered per layer, 0 where none are, and how many sets."""
        return self.chooser.gathered(self.params, self.groups, self.rows)

    @property
    def _new_cache_bytes(self) -> int:
        if self.past is not None and self.past.cache.capacity >= self.capacity:
            return 0
        return cache_bytes(self.params.config, self.rows, self.capacity, self.params.dtype)

    @property
    def added_bytes(self) -> int:
        """Bytes of the cache and of narrowed weights that the call makes: at least so many."""
        config = self.params.config
        kept, sets = self.gathered
        multiple = multiple_of(self.params)
        widths = [padded_width(neurons, config.mlp_size, multiple) for neurons in kept]
        narrowed = sum(narrowed_bytes(self.params, (l,), width, sets) for l, width in enumerate(widths))
        if self.regathers:
            # While weights are gathered anew, those before are there.
            narrowed = 2 * narrowed + self._regathering_bytes
        return self._new_cache_bytes + narrowed

    @property
    def needed_bytes(self) -> int:
        """Bytes that the call needs at a time: first the prefill's temporaries stand beside the cache, then weights."""
        reading = prefill_bytes(self.params.config, self.prompts.tokens.shape, self.filled, self.observer)
        return max(self.added_bytes, self._new_cache_bytes + reading)


def checked_request(
    params: Params,
    text: Prompts,
    chooser: Choosing,
    groups: Groups | None,
    drawing: Drawing,
    max_new_tokens: int,
    past: Past | None = None,
    device_rows: DeviceRows | None = None,
    lossless: bool = False,
    regather_at: float | None = None,
) -> Request:
    """The request of these parts, where the chooser can choose for it and there is memory for it.

    Of the prompts `text` only what lies behind the `past` is to be read.

    Raises:
        CoreInferError: there is not, or it cannot.
    """
    prompts = text if past is None else without_first(text, past.read)
    chooser.check(params, groups, len(prompts.lengths))
    counted = chooser.counted(prompts.tokens, prompts.lengths, past.read if past else 0, params.config)
    there = device_rows or (NOTHING if past is None else past.device_rows)
    check_rows(there, params)
    request = Request(
        params, prompts, text, chooser, groups, drawing, max_new_tokens, past, counted, there, lossless, regather_at
    )
    narrows = any(request.gathered[0])
    check_memory(
        bytes_in_a_memory(request.needed_bytes, params.mesh),
        f"a cache of {request.capacity} positions, its prefill and narrowed weights for {request.rows} rows",
        f"ask for fewer rows or tokens{', or fewer core neurons' if narrows else ''}",
    )
    return request
