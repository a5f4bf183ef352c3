"""Prefill, choose core neurons, narrow, decode: from a request to chunks of tokens.

The full model reads the prompt and sums up its neurons' activations on the way; its logits give the first new token.
Every pass after that runs on narrowed weights, several tokens per dispatch, through one compiled program per shape.
Lossless, they only draft for the full model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import jax
import numpy as np
from jax import Array

from coreinfer_jax.checks import check_finite
from coreinfer_jax.engine.dispatch import bytes_read_per_token, undrafted
from coreinfer_jax.engine.lossless import drafted
from coreinfer_jax.engine.programs import no_sums, prefill
from coreinfer_jax.engine.regathering import regathering
from coreinfer_jax.engine.request import Past, Request
from coreinfer_jax.engine.results import Chunk, Stats
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.engine.streamed import extend_streamed, first_token, pass_of_prefill
from coreinfer_jax.model.cache import init_cache, with_capacity
from coreinfer_jax.model.host import is_on_host, mlp_bytes, without_layers
from coreinfer_jax.model.weights import Layer, Params
from coreinfer_jax.sparsity.choice import Chosen, Ranked
from coreinfer_jax.sparsity.moving import DeviceRows, moved_bytes, rows_of

STREAM_CHUNK = 8


@dataclass(frozen=True)
class Begun:
    """All there is before the first token.

    Attributes:
        rows: of the first token, drawn but not yet read.
        logits: float32 [B, V], the full model's, that it was drawn from.
        past: what the full model has read; it dies with the next decode step, which is given its cache.
        chosen: the core neurons.
        stats: the costs so far.
    """

    rows: Rows
    logits: Array
    past: Past
    chosen: Chosen
    stats: Stats


def run(request: Request, tokens_per_dispatch: int) -> Iterator[tuple[Chunk, Past]]:
    """Chunks of new tokens, each with what the full model has read, for a later request of a single row to go on from.

    A `Past` dies when the next chunk is asked for: its cache is donated.
    """
    begun = begin(request)
    rows, past, stats, core = begun.rows, begun.past, begun.stats, begun.chosen.core
    # Copies: on a CPU asarray would share the memory that the next dispatch is given to overwrite.
    lengths = np.array(rows.length)
    first = np.array(rows.token)[:, None]
    yield Chunk(tokens=first, lengths=lengths, core=core, stats=stats, device_rows=past.device_rows), past
    if np.array(rows.done).all():
        return
    # Only now: the first token, which is the full model's, does not wait for the gather.
    began = perf_counter()
    weights, there, moved = _narrowed(request, begun.chosen)
    stats = replace(stats, compaction_seconds=perf_counter() - began)
    past = replace(past, device_rows=there)
    past.check_alive()
    moved += stats.moved_bytes
    if request.lossless:
        # The full model does not draft for itself.
        narrow = None if core is None or all(own is None for own in core.layers) else weights
        following = regathering(request, past.sums, begun.chosen)
        dispatches = drafted(request.params, narrow, there.whole, rows, tokens_per_dispatch, following)
        del narrow  # they go when others are gathered in their place
    else:
        dispatches = undrafted(weights, rows, tokens_per_dispatch)
    del weights
    began = perf_counter()
    for made in dispatches:
        check_finite(np.array(made.rows.finite).all())
        stats = replace(
            stats,
            decode_seconds=stats.decode_seconds + perf_counter() - began,
            decode_steps=made.steps,
            bytes_read_per_token=made.bytes_read_per_token,
            moved_bytes=moved + made.moved_bytes,
            drafting=made.drafting,
        )
        if made.chosen is not None:
            core, stats = made.chosen.core, replace(stats, choices=made.chosen.choices)
        past = replace(past, cache=made.rows.cache)
        yield Chunk(made.tokens, made.lengths, core=core, stats=stats, device_rows=past.device_rows), past
        if not np.array(made.rows.done).all():
            past.check_alive()  # another turn may have gone on from the last chunk
        began = perf_counter()


def _narrowed(request: Request, chosen: Chosen) -> tuple[Params, DeviceRows, int]:
    """The weights to decode with; what these leave of MLPs that stay on the host, and the bytes that were moved."""
    params, there = request.params, request.device_rows
    if not is_on_host(params):
        return jax.block_until_ready(chosen.weights(params)), there, 0
    if chosen.indices is None:
        return chosen.weights(params), there, 0
    moved = moved_bytes(params, chosen.indices, there)
    weights = chosen.weights(params, there)
    return weights, rows_of(params, weights, chosen.indices), moved


def begin(request: Request) -> Begun:
    """Prefill and choose."""
    params, prompts = request.params, request.prompts
    began = perf_counter()
    rows, sums, logits, ranked = _prefilled(request)
    jax.block_until_ready(rows)
    check_finite(np.array(rows.finite).all())
    prefilled = perf_counter()
    chosen = request.chooser.choose(request.seen(sums, ranked))
    selected = perf_counter()
    decoding = params.weights if request.lossless else chosen.shapes(params)
    methods = {choice.method for choice in chosen.choices}
    read = tuple(int(length) for length in request.cached + prompts.lengths)
    stats = Stats(
        method=methods.pop() if len(methods) == 1 else "mixed",
        choices=chosen.choices,
        kept_neurons=chosen.kept(params.config),
        mlp_size=params.config.mlp_size,
        prompt_tokens=read,
        cached_tokens=(request.cached,) * request.rows,
        prefill_seconds=prefilled - began,
        selection_seconds=selected - prefilled,
        compaction_seconds=0.0,
        decode_seconds=0.0,
        decode_steps=0,
        bytes_read_per_token=bytes_read_per_token(decoding, rows.cache),
        moved_bytes=_streamed_bytes(request),
    )
    return Begun(rows, logits, Past(rows.cache, sums, read[0], request.device_rows), chosen, stats)


def _streamed_bytes(request: Request) -> int:
    """Bytes of MLPs that the prefill moves to the device."""
    params, there = request.params, request.device_rows.whole
    if not is_on_host(params):
        return 0
    return sum(mlp_bytes(layer.mlp) for l, layer in enumerate(params.layers) if l not in there)


def _prefilled(request: Request) -> tuple[Rows, list[Any], Array, Mapping[int, Ranked]]:
    """The prefill of a request, on what its past has left or from the start, and layers ranked on the way."""
    if is_on_host(request.params):
        return _prefilled_from_host(request)
    params, prompts, observed = request.params.weights, request.prompts, request.observed
    observer = request.observer
    if request.past is None:
        cache = init_cache(params.config, request.rows, request.capacity, params.dtype, params.mesh)
        sums = []
        if observer is not None:
            sums = no_sums(observer, params.layers[0], prompts.tokens, layers=len(observed), mesh=params.mesh)
    else:
        request.past.check_alive()  # another request may have gone on from it since
        cache, sums = with_capacity(request.past.cache, request.capacity), request.past.sums
    rows, sums, logits = prefill(
        params,
        prompts.tokens,
        prompts.lengths,
        np.full(request.rows, request.cached, np.int32),
        cache,
        sums,
        make_sampling(params.config, request.rows, request.drawing, request.max_new_tokens),
        observer,
        request.history(cache.capacity) if request.looks_back else None,
        observed=observed,
        filled=request.filled,
    )
    return rows, sums, logits, {}


def _prefilled_from_host(request: Request) -> tuple[Rows, list[Any], Array, Mapping[int, Ranked]]:
    """`_prefilled` of a model whose MLPs stay on the host."""
    params, prompts = request.params.weights, request.prompts
    start = np.full(request.rows, request.cached, np.int32)
    sampling = make_sampling(params.config, request.rows, request.drawing, request.max_new_tokens)
    if request.past is None:
        cache, sums = init_cache(params.config, request.rows, request.capacity, params.dtype), None
    else:
        request.past.check_alive()
        cache, sums = with_capacity(request.past.cache, request.capacity), request.past.sums
    reading = pass_of_prefill(
        params,
        prompts.tokens,
        prompts.lengths,
        start,
        request.observer,
        request.observed,
        request.filled,
        request.device_rows.whole,
    )
    ranked: dict[int, Ranked] = {}

    def rank(l: int, layer: Layer, own: Any) -> Ranked | None:
        best = request.ranked(l, layer, own)
        if best is not None:
            ranked[l] = best
        return best

    x, cache, sums = extend_streamed(reading, cache, sums, rank)
    history = request.history(cache.capacity) if request.looks_back else None
    rows, logits = first_token(without_layers(params), x, prompts.lengths, start, cache, sampling, history)
    return rows, sums, logits, ranked
