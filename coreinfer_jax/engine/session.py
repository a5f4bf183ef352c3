"""Prefill, choose core neurons, narrow, decode: one generation from checked request to chunks of tokens.

The full model reads the prompt and sums up its neurons' activations on the way; its logits give the first new token.
Every pass after that runs on narrowed weights, several tokens per dispatch, through one compiled program per shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter

import jax
import numpy as np
from jax import Array

from coreinfer_jax.engine.programs import DecodeState, decode, no_sums, prefill
from coreinfer_jax.engine.prompts import check_finite
from coreinfer_jax.engine.request import Past, Request, check_alive
from coreinfer_jax.engine.results import Chunk, Stats
from coreinfer_jax.model.cache import KVCache, init_cache, with_capacity
from coreinfer_jax.model.config import CoreConfig
from coreinfer_jax.model.weights import Params, leaf_bytes, weight_bytes_per_step
from coreinfer_jax.sparsity.choosers import Predicted, all_neurons, given, predict
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.rules import Sums

STREAM_CHUNK = 8


@dataclass(frozen=True)
class Begun:
    """All there is before the first token.

    Attributes:
        state: of the first token, drawn but not yet read.
        logits: float32 [B, V], the full model's, that it was drawn from.
        sums: of each voted layer, over the prompts.
        predicted: the core neurons.
        stats: the costs so far.
    """

    state: DecodeState
    logits: Array
    sums: list[Sums]
    predicted: Predicted
    stats: Stats


def run(request: Request, steps_per_dispatch: int) -> Iterator[tuple[Chunk, Past]]:
    """Chunks of new tokens, each with what the full model has read, for a later request of a single row to go on from.

    A `Past` dies when the next chunk is asked for: its cache is donated.
    """
    begun = begin(request)
    state, sums, predicted, stats = begun.state, begun.sums, begun.predicted, begun.stats
    used, read = predicted.core, stats.prompt_tokens[0]
    # Copies: on a CPU asarray would share the memory that the next dispatch is given to overwrite.
    lengths = np.array(state.length)
    first = Chunk(tokens=np.array(state.token)[:, None], lengths=lengths, core=used, stats=stats)
    yield first, Past(state.cache, sums, read)
    made = 1
    if _is_complete(request, state, made):
        return
    # Only now: the first token, which is the full model's, does not wait for the gather.
    began = perf_counter()
    narrowed = jax.block_until_ready(predicted.weights(request.params))
    stats = replace(stats, compaction_seconds=perf_counter() - began)
    while not _is_complete(request, state, made):
        began = perf_counter()
        steps = min(steps_per_dispatch, request.max_new_tokens - made)
        state, drawn = decode(narrowed, state, request.sampling, np.int32(steps))
        new_lengths = np.array(state.length)
        steps_run = int(state.step) - made
        check_finite(state.finite)
        stats = replace(
            stats,
            decode_seconds=stats.decode_seconds + perf_counter() - began,
            decode_steps=stats.decode_steps + steps_run,
        )
        chunk = Chunk(tokens=np.array(drawn)[:, :steps_run], lengths=new_lengths - lengths, core=used, stats=stats)
        yield chunk, Past(state.cache, sums, read)
        lengths, made = new_lengths, made + steps_run


def _is_complete(request: Request, state: DecodeState, made: int) -> bool:
    return made >= request.max_new_tokens or bool(np.array(state.done).all())


def begin(request: Request) -> Begun:
    """Prefill and select."""
    params, prompts, cached, capacity = request.params, request.prompts, request.cached, request.capacity
    rows, lengths = len(prompts.lengths), cached + prompts.lengths
    rule = request.core.ranking if isinstance(request.core, CoreConfig) else "votes"
    began = perf_counter()
    if request.past is None:
        cache = init_cache(params.config, rows, capacity, params.token_embedding.dtype)
        early = request.voting is not None and request.voting.early is not None
        sums = no_sums(params.config, rows, len(request.voted), rule, early)
    else:
        check_alive(request.past)  # another request may have gone on from it since
        cache, sums = with_capacity(request.past.cache, capacity), request.past.sums
    state, sums, logits = prefill(
        params,
        prompts.tokens,
        prompts.lengths,
        np.full(rows, cached, np.int32),
        cache,
        sums,
        request.sampling,
        request.voting,
        voted=request.voted,
        rule=rule,
    )
    jax.block_until_ready(state)
    check_finite(state.finite)

    prefilled = perf_counter()
    predicted = _predicted(request, sums)
    selected = perf_counter()
    narrowed = predicted.shapes(params)
    methods = {choice.method for choice in predicted.choices}
    stats = Stats(
        method=methods.pop() if len(methods) == 1 else "mixed",
        choices=predicted.choices,
        kept_neurons=tuple(layer.mlp.width for layer in narrowed.layers),
        mlp_size=params.config.mlp_size,
        prompt_tokens=tuple(int(length) for length in lengths),
        cached_tokens=(cached,) * rows,
        prefill_seconds=prefilled - began,
        selection_seconds=selected - prefilled,
        compaction_seconds=0.0,
        decode_seconds=0.0,
        decode_steps=0,
        bytes_read_per_token=bytes_read_per_token(narrowed, state.cache),
    )
    return Begun(state, logits, sums, predicted, stats)


def _predicted(request: Request, sums: list[Sums]) -> Predicted:
    """The core neurons to decode with, on the device."""
    core, params = request.core, request.params
    if core is None:
        return all_neurons(params)
    if isinstance(core, CoreNeurons):
        return given(core)
    by_layer = dict(zip(request.voted, sums, strict=True))
    return predict(core, by_layer, request.voters, params, request.groups, request.calibration)


def bytes_read_per_token(params: Params, cache: KVCache) -> float:
    """Bytes a decode step reads, weights and the whole cache, divided by the B rows it makes a token for."""
    rows = cache.keys[0].shape[0]
    cached = sum(leaf_bytes(array) for array in cache.keys + cache.values)
    return (weight_bytes_per_step(params, rows) + cached) / rows
