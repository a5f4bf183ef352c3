"""Prefill, choose core neurons, narrow, decode: `generate` and `stream`.

The full model reads the prompt and counts votes on the way; its logits give the first new token. Every pass after that
runs on narrowed weights, several tokens per dispatch, through one compiled program per shape.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import jax
import numpy as np
from jax import Array

from coreinfer_jax.cache import KVCache, bucket
from coreinfer_jax.config import CoreConfig
from coreinfer_jax.core.compact import check_dense, narrow
from coreinfer_jax.core.neurons import CoreNeurons
from coreinfer_jax.core.predict import counted_tokens, given_indices, narrowed_layers, stability_indices
from coreinfer_jax.core.select import Voting, make_voting
from coreinfer_jax.decoding import DISPATCH, DecodeState, decode, prefill
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.inputs import Prompts, Tokens, check_finite, check_length, fill_id, make_sampling, pad_prompts
from coreinfer_jax.params import Params, leaf_bytes, weight_bytes_per_step
from coreinfer_jax.sampling import Sampling

Method = Literal["dense", "stability", "given"]
Core = CoreConfig | CoreNeurons | None

STREAM_CHUNK = 8


@dataclass(frozen=True)
class Stats:
    """What a generation did and what it cost.

    Seconds are wall-clock, each phase awaited; the first call of a shape includes compiling its programs.

    Attributes:
        method: `dense`; `stability` (chosen from the prompt); `given` (the caller's core neurons).
        kept_neurons: neurons per layer the decode steps read, F where a layer is dense.
        mlp_size: F.
        prompt_tokens: per row.
        prefill_seconds: the full model over the prompt, with vote counting, and the first token.
        selection_seconds: votes to indices.
        compaction_seconds: the gather of the narrowed weights.
        decode_seconds: all decode steps so far.
        decode_steps: passes of the narrowed model so far; each makes one token per unfinished row.
        bytes_read_per_token: weights and KV cache one decode step reads, divided by the rows it serves.
    """

    method: Method
    kept_neurons: tuple[int, ...]
    mlp_size: int
    prompt_tokens: tuple[int, ...]
    prefill_seconds: float
    selection_seconds: float
    compaction_seconds: float
    decode_seconds: float
    decode_steps: int
    bytes_read_per_token: float


@dataclass(frozen=True)
class Chunk:
    """Newly generated tokens.

    Attributes:
        tokens: int32 [B, n]; a row that is complete holds the fill id.
        lengths: int32 [B], how many of the n belong to each row.
        core: the core neurons in use, None when dense.
        stats: costs up to and including this chunk.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    core: CoreNeurons | None
    stats: Stats


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
        tokens: int32 [B, max_new_tokens], new tokens only; after a row's length it holds `fill_id`.
        lengths: int32 [B], new tokens per row, an EOS counted.
        fill_id: the model's padding id, or 0 when it has none.
        core: the core neurons used, None when dense.
        stats: costs.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    fill_id: int
    core: CoreNeurons | None
    stats: Stats


@dataclass(frozen=True)
class _Request:
    """A checked call: `voted` are the layers whose tokens vote, `voting` how; () and None when nothing is chosen."""

    params: Params
    prompts: Prompts
    core: Core
    voted: tuple[int, ...]
    voting: Voting | None
    sampling: Sampling
    max_new_tokens: int


def generate(
    params: Params,
    tokens: Tokens,
    core: Core = CoreConfig(),
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Iterable[int] = (),
    key: Array | int | None = None,
) -> Generation:
    """Generate from prompts with the MLPs narrowed to core neurons after the prefill.

    The first new token is drawn from the full model's logits; narrowed weights act from the pass over it onwards.
    Programs are compiled per batch size, prompt bucket and cache bucket (powers of two, at least 64) and kept widths;
    other prompts, lengths and settings reuse them. Greedy and sampled decoding are two programs.

    Args:
        params: dense weights, from `load`.
        tokens: int [B, T], or a list of lists of unequal lengths; rows are padded here.
        core: a `CoreConfig` chooses core neurons from the prompt; `CoreNeurons` are used as they are; None is dense.
            With `per_row=True` each row equals its own single run and a step reads B narrowed MLPs; with
            `per_row=False` all rows vote for one set, which a step reads once.
        max_new_tokens: new tokens per row, at most.
        temperature: 0 takes the most probable token; above 0 draws.
        top_k: draw among the k most probable tokens only.
        top_p: draw among the smallest set of tokens with at least this probability only.
        eos_ids: a row ends after any of these, looked for among new tokens only; () never stops.
        key: `jax.random.key` or int seed; row i draws its t-th token with fold_in(fold_in(key, i), t).

    Returns:
        `Generation`.

    Raises:
        CoreInferError: an empty prompt, an id outside the vocabulary, more tokens than the model has positions, a
            setting outside its range, core neurons of another model, logits that are NaN or infinite.
    """
    check_dense(params)
    sampling = make_sampling(params.config, temperature, top_k, top_p, eos_ids, key)
    chunks = list(_run(params, tokens, core, max_new_tokens, sampling, DISPATCH))
    filled = fill_id(params.config)
    made = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    padded = np.full((made.shape[0], max_new_tokens), filled, np.int32)
    padded[:, : made.shape[1]] = made
    lengths = np.stack([chunk.lengths for chunk in chunks]).sum(axis=0, dtype=np.int32)
    return Generation(tokens=padded, lengths=lengths, fill_id=filled, core=chunks[-1].core, stats=chunks[-1].stats)


def stream(
    params: Params,
    tokens: Tokens,
    core: Core = CoreConfig(),
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Iterable[int] = (),
    key: Array | int | None = None,
) -> Iterator[Chunk]:
    """The tokens of `generate` as they are made: the first alone, then up to 8 per chunk.

    Arguments and errors are those of `generate`, raised at the call; leave the loop to stop early.
    """
    check_dense(params)
    sampling = make_sampling(params.config, temperature, top_k, top_p, eos_ids, key)
    return _run(params, tokens, core, max_new_tokens, sampling, STREAM_CHUNK)


def _run(
    params: Params, tokens: Tokens, core: Core, max_new_tokens: int, sampling: Sampling, steps_per_dispatch: int
) -> Iterator[Chunk]:
    """Check everything now, so that mistakes surface at the call; work when the first chunk is asked for."""
    prompts = pad_prompts(tokens, params.config)
    check_length(int(prompts.lengths.max()), max_new_tokens, params.config)
    if core is not None and not isinstance(core, CoreConfig | CoreNeurons):
        raise CoreInferError(f"core={core!r}: give CoreConfig, CoreNeurons, or None for all neurons")
    if isinstance(core, CoreNeurons):
        core.check(params.config)
        core.check_rows(len(prompts.lengths))
    voted, voting = _voting(params, prompts, core)
    request = _Request(params, prompts, core, voted, voting, sampling, int(max_new_tokens))
    return _chunks(request, steps_per_dispatch)


def _voting(params: Params, prompts: Prompts, core: Core) -> tuple[tuple[int, ...], Voting | None]:
    """The layers whose tokens vote, and who votes how; nothing where nothing is to be chosen."""
    if not isinstance(core, CoreConfig):
        return (), None
    counted = counted_tokens(core, prompts.tokens, prompts.lengths, params.config)
    voting = make_voting(counted, params.config.mlp_size, core.alpha, core.budget)
    return narrowed_layers(core, params.config), voting


def _chunks(request: _Request, steps_per_dispatch: int) -> Iterator[Chunk]:
    state, narrowed, used, stats = _begin(request)
    # Copies: on a CPU asarray would share the memory that the next dispatch is given to overwrite.
    lengths = np.array(state.length)
    yield Chunk(tokens=np.array(state.token)[:, None], lengths=lengths, core=used, stats=stats)
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
        yield Chunk(tokens=np.array(drawn)[:, :steps_run], lengths=new_lengths - lengths, core=used, stats=stats)
        lengths, made = new_lengths, made + steps_run


def _begin(request: _Request) -> tuple[DecodeState, Params, CoreNeurons | None, Stats]:
    """Prefill, select, compact: the state before the first decode step, the weights for it, and the costs so far."""
    params, core, lengths = request.params, request.core, request.prompts.lengths
    capacity = bucket(int(lengths.max()) + request.max_new_tokens)
    began = perf_counter()
    state, votes = prefill(
        params,
        request.prompts.tokens,
        lengths,
        request.sampling,
        request.voting,
        capacity=capacity,
        voted=request.voted,
    )
    jax.block_until_ready(state)
    check_finite(state.finite)

    prefilled = perf_counter()
    indices, used = None, core
    if isinstance(core, CoreConfig):
        indices = jax.block_until_ready(stability_indices(core, votes, params.config, len(lengths)))
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
        prefill_seconds=prefilled - began,
        selection_seconds=selected - prefilled,
        compaction_seconds=compacted - selected,
        decode_seconds=0.0,
        decode_steps=0,
        bytes_read_per_token=bytes_read_per_token(narrowed, state.cache),
    )
    return state, narrowed, used, stats


def bytes_read_per_token(params: Params, cache: KVCache) -> float:
    """Bytes a decode step reads, weights and the whole cache, divided by the B rows it makes a token for."""
    rows = cache.keys[0].shape[0]
    cached = sum(leaf_bytes(array) for array in cache.keys + cache.values)
    return (weight_bytes_per_step(params, rows) + cached) / rows
