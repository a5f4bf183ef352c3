"""Prefill, choose core neurons, narrow, decode: one generation from checked request to chunks of tokens.

The full model reads the prompt and counts votes on the way; its logits give the first new token. Every pass after that
runs on narrowed weights, several tokens per dispatch, through one compiled program per shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter

import jax
import numpy as np

from coreinfer_jax.cache import KVCache, bucket, init_cache, with_capacity
from coreinfer_jax.config import CoreConfig
from coreinfer_jax.core.compact import narrow
from coreinfer_jax.core.neurons import CoreNeurons
from coreinfer_jax.core.predict import counted_tokens, given_indices, narrowed_layers, stability_indices
from coreinfer_jax.core.select import Votes, Voting, make_voting
from coreinfer_jax.decoding import DecodeState, decode, no_votes, prefill
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.inputs import Prompts, Tokens, check_finite, check_length, pad_prompts
from coreinfer_jax.params import Params, leaf_bytes, weight_bytes_per_step
from coreinfer_jax.results import Chunk, Stats
from coreinfer_jax.sampling import Sampling

Core = CoreConfig | CoreNeurons | None

STREAM_CHUNK = 8


@dataclass(frozen=True)
class Past:
    """What the full model has read of every row, to go on from. Its arrays are donated when a request does.

    Attributes:
        cache: keys and values in slots 0 .. read - 1; what decode steps wrote after them will be overwritten.
        votes: of each voted layer, [B, F].
        read: tokens read, the same number in every row.
    """

    cache: KVCache
    votes: list[Votes]
    read: int

    @property
    def is_alive(self) -> bool:
        """Whether its arrays are still there."""
        return not any(array.is_deleted() for array in jax.tree.leaves((self.cache, self.votes)))


@dataclass(frozen=True)
class Request:
    """A checked call.

    Attributes:
        params: dense weights.
        prompts: what is to be read.
        core: how core neurons are chosen, or which, or None.
        voted: the layers whose tokens vote; () when nothing is chosen.
        voting: how they vote; None when nothing is chosen.
        sampling: how tokens are drawn.
        max_new_tokens: per row.
        past: what the full model has read of the rows before; None for nothing.
    """

    params: Params
    prompts: Prompts
    core: Core
    voted: tuple[int, ...]
    voting: Voting | None
    sampling: Sampling
    max_new_tokens: int
    past: Past | None


def make_request(
    params: Params, tokens: Tokens, core: Core, max_new_tokens: int, sampling: Sampling, past: Past | None = None
) -> Request:
    """Check everything, so that mistakes surface at the call and not when the first chunk is asked for."""
    prompts = pad_prompts(tokens, params.config)
    cached = past.read if past else 0
    check_length(cached + int(prompts.lengths.max()), max_new_tokens, params.config)
    if core is not None and not isinstance(core, CoreConfig | CoreNeurons):
        raise CoreInferError(f"core={shown(core)}: give CoreConfig, CoreNeurons, or None for all neurons")
    if isinstance(core, CoreNeurons):
        core.check(params.config)
        core.check_rows(len(prompts.lengths))
    voted, voting = _voting(params, prompts, core, cached)
    return Request(params, prompts, core, voted, voting, sampling, int(max_new_tokens), past)


def check_alive(past: Past) -> None:
    """Refuse a past whose memory another request was given."""
    if not past.is_alive:
        raise CoreInferError(
            "conversation: another turn has gone on from it; give the latest, or None to read all again"
        )


def _voting(params: Params, prompts: Prompts, core: Core, cached: int) -> tuple[tuple[int, ...], Voting | None]:
    """The layers whose tokens vote, and who votes how; nothing where nothing is to be chosen."""
    if not isinstance(core, CoreConfig):
        return (), None
    counted = counted_tokens(core, prompts.tokens, prompts.lengths, cached, params.config)
    voting = make_voting(counted, params.config.mlp_size, core.alpha, core.budget)
    return narrowed_layers(core, params.config), voting


def run(request: Request, steps_per_dispatch: int) -> Iterator[tuple[Chunk, Past]]:
    """Chunks of new tokens, each with what the full model has read, for a later request of a single row to go on from.

    A `Past` dies when the next chunk is asked for: its cache is donated.
    """
    state, votes, narrowed, used, stats = _begin(request)
    read = stats.prompt_tokens[0]
    # Copies: on a CPU asarray would share the memory that the next dispatch is given to overwrite.
    lengths = np.array(state.length)
    first = Chunk(tokens=np.array(state.token)[:, None], lengths=lengths, core=used, stats=stats)
    yield first, Past(state.cache, votes, read)
    made = 1
    while made < request.max_new_tokens and not np.array(state.done).all():
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
        yield chunk, Past(state.cache, votes, read)
        lengths, made = new_lengths, made + steps_run


def _begin(request: Request) -> tuple[DecodeState, list[Votes], Params, CoreNeurons | None, Stats]:
    """Prefill, select, compact: all there is before the first decode step, and the costs so far."""
    params, core, prompts = request.params, request.core, request.prompts
    rows, cached = len(prompts.lengths), request.past.read if request.past else 0
    lengths = cached + prompts.lengths
    capacity = bucket(int(lengths.max()) + request.max_new_tokens)
    began = perf_counter()
    if request.past is None:
        cache = init_cache(params.config, rows, capacity, params.token_embedding.dtype)
        votes = no_votes(params.config, rows, len(request.voted))
    else:
        check_alive(request.past)  # another request may have gone on from it since
        cache, votes = with_capacity(request.past.cache, capacity), request.past.votes
    state, votes = prefill(
        params,
        prompts.tokens,
        prompts.lengths,
        np.full(rows, cached, np.int32),
        cache,
        votes,
        request.sampling,
        request.voting,
        voted=request.voted,
    )
    jax.block_until_ready(state)
    check_finite(state.finite)

    prefilled = perf_counter()
    indices, used = None, core
    if isinstance(core, CoreConfig):
        indices = jax.block_until_ready(stability_indices(core, votes, params.config, rows))
        used = CoreNeurons(indices)
    elif isinstance(core, CoreNeurons):
        indices = given_indices(core)
    selected = perf_counter()
    narrowed = params if indices is None else jax.block_until_ready(narrow(params, indices))
    compacted = perf_counter()

    assert not isinstance(used, CoreConfig)
    stats = Stats(
        method="stability" if isinstance(core, CoreConfig) else "dense" if core is None else "given",
        kept_neurons=tuple(layer.mlp.width for layer in narrowed.layers),
        mlp_size=params.config.mlp_size,
        prompt_tokens=tuple(int(length) for length in lengths),
        cached_tokens=(cached,) * rows,
        prefill_seconds=prefilled - began,
        selection_seconds=selected - prefilled,
        compaction_seconds=compacted - selected,
        decode_seconds=0.0,
        decode_steps=0,
        bytes_read_per_token=bytes_read_per_token(narrowed, state.cache),
    )
    return state, votes, narrowed, used, stats


def bytes_read_per_token(params: Params, cache: KVCache) -> float:
    """Bytes a decode step reads, weights and the whole cache, divided by the B rows it makes a token for."""
    rows = cache.keys[0].shape[0]
    cached = sum(leaf_bytes(array) for array in cache.keys + cache.values)
    return (weight_bytes_per_step(params, rows) + cached) / rows
