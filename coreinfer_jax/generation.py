"""Prefill, choose core neurons, narrow, decode: `generate`, `stream` and `forward`.

The full model reads the prompt and counts votes on the way; its logits give the first new token. Every pass after that
runs on narrowed weights, several tokens per dispatch, through one compiled program per shape.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from numpy.typing import ArrayLike

from coreinfer_jax.cache import KVCache, bucket, init_cache
from coreinfer_jax.config import CoreConfig, ModelConfig
from coreinfer_jax.core.compact import Indices, check_dense, compact, narrow
from coreinfer_jax.core.neurons import CoreNeurons
from coreinfer_jax.core.select import Votes, Voting, count_votes, kept_neurons, make_voting, most_voted, pooled
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.inputs import Prompts, Tokens, check_length, fill_id, make_sampling, pad_prompts
from coreinfer_jax.models import extend, unembed
from coreinfer_jax.params import Params, leaf_bytes, weight_bytes_per_step
from coreinfer_jax.sampling import Sampling, draw

Method = Literal["dense", "stability", "given"]

# Tokens a decode dispatch has room for. How many it makes is data, so streaming in small chunks and generating in
# large ones share a program.
DISPATCH = 64
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


@struct.dataclass
class DecodeState:
    """Everything a decode step carries.

    Attributes:
        cache: keys and values of every token before `token`.
        token: int32 [B], drawn but not yet run through the model.
        position: int32 [B], where it will stand.
        length: int32 [B], new tokens per row, `token` counted.
        done: bool [B], rows that have drawn an EOS.
        step: int32 [], index of the next draw.
        finite: bool [], whether all logits so far were finite.
    """

    cache: KVCache
    token: Array
    position: Array
    length: Array
    done: Array
    step: Array
    finite: Array


def generate(
    params: Params,
    tokens: Tokens,
    core: CoreConfig | CoreNeurons | None = CoreConfig(),  # noqa: B008 - frozen, so sharing it is safe
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
    chunks = list(
        _run(params, tokens, core, max_new_tokens, temperature, top_k, top_p, eos_ids, key, steps_per_dispatch=DISPATCH)
    )
    filled = fill_id(params.config)
    made = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    padded = np.full((made.shape[0], max_new_tokens), filled, np.int32)
    padded[:, : made.shape[1]] = made
    lengths = np.stack([chunk.lengths for chunk in chunks]).sum(axis=0, dtype=np.int32)
    return Generation(tokens=padded, lengths=lengths, fill_id=filled, core=chunks[-1].core, stats=chunks[-1].stats)


def stream(
    params: Params,
    tokens: Tokens,
    core: CoreConfig | CoreNeurons | None = CoreConfig(),  # noqa: B008 - frozen, so sharing it is safe
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
    return _run(
        params, tokens, core, max_new_tokens, temperature, top_k, top_p, eos_ids, key, steps_per_dispatch=STREAM_CHUNK
    )


def forward(params: Params, tokens: ArrayLike, core: CoreNeurons | None = None) -> Array:
    """Logits of every position of whole texts, without padding or a cache to keep.

    Pure, so it can be compiled with the core neurons as a truly static argument,
    `jax.jit(forward, static_argnames="core")`: the indices become constants of the program, for study, export and
    tests. Decoding goes through `compact` instead, whose programs serve every set of the same size.

    Args:
        params: dense weights, or narrowed ones with `core` None.
        tokens: int [B, T].
        core: use only these neurons, at every position.

    Returns:
        float32 [B, T, V].

    Raises:
        CoreInferError: ids outside the vocabulary, more tokens than positions, core neurons that do not fit.
    """
    if not isinstance(tokens, jax.core.Tracer):
        lengths = pad_prompts(tokens, params.config).lengths
        if lengths.max() != lengths.min():
            raise CoreInferError("tokens: rows of unequal lengths; `forward` takes one length, `generate` takes any")
    ids = jnp.asarray(tokens, jnp.int32)
    if ids.shape[1] > params.config.max_positions:
        raise CoreInferError(f"{ids.shape[1]} tokens exceed the model's {params.config.max_positions} positions")
    if core is not None:
        _check_rows(core, ids.shape[0])
        params = compact(params, core)
    return _logits(params, ids)


@jax.jit
def _logits(params: Params, tokens: Array) -> Array:
    B, T = tokens.shape
    cache = init_cache(params.config, B, T, params.token_embedding.dtype)
    hidden, _, _ = extend(params, tokens, cache, jnp.zeros(B, jnp.int32), _observe_nothing)
    return unembed(params, hidden)


def _run(
    params: Params,
    tokens: Tokens,
    core: CoreConfig | CoreNeurons | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_ids: Iterable[int],
    key: Array | int | None,
    steps_per_dispatch: int,
) -> Iterator[Chunk]:
    """Check everything now, so that mistakes surface at the call; work when the first chunk is asked for."""
    config = params.config
    check_dense(params)
    prompts = pad_prompts(tokens, config)
    check_length(int(prompts.lengths.max()), max_new_tokens, config)
    sampling = make_sampling(config, temperature, top_k, top_p, eos_ids, key)
    if isinstance(core, CoreNeurons):
        core.check(config)
        _check_rows(core, len(prompts.lengths))
    if isinstance(core, CoreConfig):
        _check_choice(core, prompts, config)
    return _chunks(params, prompts, core, sampling, max_new_tokens, steps_per_dispatch)


def _chunks(
    params: Params,
    prompts: Prompts,
    core: CoreConfig | CoreNeurons | None,
    sampling: Sampling,
    max_new_tokens: int,
    steps_per_dispatch: int,
) -> Iterator[Chunk]:
    state, narrowed, used, stats = _begin(params, prompts, core, sampling, max_new_tokens)
    lengths = np.asarray(state.length)
    yield Chunk(tokens=np.asarray(state.token)[:, None], lengths=lengths, core=used, stats=stats)
    made = 1
    while made < max_new_tokens and not np.asarray(state.done).all():
        began = perf_counter()
        steps = min(steps_per_dispatch, max_new_tokens - made)
        state, drawn = _decode(narrowed, state, sampling, np.int32(steps))
        new_lengths = np.asarray(state.length)
        steps_run = int(state.step) - made
        _check_finite(state.finite)
        stats = replace(
            stats,
            decode_seconds=stats.decode_seconds + perf_counter() - began,
            decode_steps=stats.decode_steps + steps_run,
        )
        yield Chunk(tokens=np.asarray(drawn)[:, :steps_run], lengths=new_lengths - lengths, core=used, stats=stats)
        lengths, made = new_lengths, made + steps_run


def _begin(
    params: Params, prompts: Prompts, core: CoreConfig | CoreNeurons | None, sampling: Sampling, max_new_tokens: int
) -> tuple[DecodeState, Params, CoreNeurons | None, Stats]:
    """Prefill, select, compact: the state before the first decode step, the weights for it, and the costs so far."""
    B = len(prompts.lengths)
    capacity = bucket(int(prompts.lengths.max()) + max_new_tokens)
    voting = _voting(core, prompts, params.config) if isinstance(core, CoreConfig) else None
    began = perf_counter()
    voted = _narrowed_layers(core, params.config) if isinstance(core, CoreConfig) else ()
    state, votes = _prefill(params, prompts.tokens, prompts.lengths, sampling, voting, capacity=capacity, voted=voted)
    jax.block_until_ready(state)
    _check_finite(state.finite)

    prefilled = perf_counter()
    indices = jax.block_until_ready(_indices(core, votes, params.config, B))
    selected = perf_counter()
    narrowed = params if indices is None else jax.block_until_ready(narrow(params, indices))
    compacted = perf_counter()

    used = CoreNeurons(indices) if isinstance(core, CoreConfig) and indices is not None else core
    assert not isinstance(used, CoreConfig)
    stats = Stats(
        method="stability" if isinstance(core, CoreConfig) else "dense" if core is None else "given",
        kept_neurons=tuple(layer.mlp.width for layer in narrowed.layers),
        mlp_size=params.config.mlp_size,
        prompt_tokens=tuple(int(length) for length in prompts.lengths),
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


@partial(jax.jit, static_argnames=("capacity", "voted"))
def _prefill(
    params: Params,
    tokens: Array,
    lengths: Array,
    sampling: Sampling,
    voting: Voting | None,
    *,
    capacity: int,
    voted: tuple[int, ...],
) -> tuple[DecodeState, list[Votes]]:
    """Run the prompts, count the votes of layers `voted`, draw the first token from the full model's logits."""
    B = tokens.shape[0]
    observe = _observe_nothing if voting is None else partial(count_votes, voting=voting)
    cache = init_cache(params.config, B, capacity, params.token_embedding.dtype)
    hidden, cache, observed = extend(params, tokens, cache, jnp.zeros(B, jnp.int32), observe)
    logits = unembed(params, hidden[jnp.arange(B), lengths - 1][:, None])[:, 0]
    first = draw(logits, sampling, jnp.int32(0))
    state = DecodeState(
        cache=cache,
        token=first,
        position=lengths,
        length=jnp.ones(B, jnp.int32),
        done=sampling.is_eos[first],
        step=jnp.int32(1),
        finite=jnp.isfinite(logits).all(),
    )
    votes = [layer_votes for l in voted if (layer_votes := observed[l]) is not None]
    return state, votes


# The cache is donated: each dispatch extends it in place. XLA's loop-invariant code motion is off because on CPU it
# hoists float32 copies of bfloat16 weights out of the loop, a second, wider copy of the model made anew each dispatch.
@partial(
    jax.jit,
    donate_argnames="state",
    compiler_options={"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
)
def _decode(params: Params, state: DecodeState, sampling: Sampling, steps: Array) -> tuple[DecodeState, Array]:
    """Up to `steps` decode steps, fewer once every row is complete: the state and the tokens drawn, int32 [B, 64]."""
    drawn = jnp.zeros((state.token.shape[0], DISPATCH), jnp.int32)

    def unfinished(loop: tuple[Array, DecodeState, Array]) -> Array:
        i, state, _ = loop
        return (i < steps) & ~state.done.all()

    def step(loop: tuple[Array, DecodeState, Array]) -> tuple[Array, DecodeState, Array]:
        i, state, drawn = loop
        state = _decode_one(params, state, sampling)
        return i + 1, state, drawn.at[:, i].set(state.token)

    _, state, drawn = lax.while_loop(unfinished, step, (jnp.int32(0), state, drawn))
    return state, drawn


def _decode_one(params: Params, state: DecodeState, sampling: Sampling) -> DecodeState:
    hidden, cache, _ = extend(params, state.token[:, None], state.cache, state.position, _observe_nothing)
    logits = unembed(params, hidden)[:, 0]
    token = jnp.where(state.done, sampling.fill, draw(logits, sampling, state.step))
    running = (~state.done).astype(jnp.int32)
    return DecodeState(
        cache=cache,
        token=token,
        # A complete row stays where it is, so that it never runs off the end of the cache.
        position=state.position + running,
        length=state.length + running,
        done=state.done | sampling.is_eos[token],
        step=state.step + 1,
        finite=state.finite & jnp.isfinite(logits).all(),
    )


def _observe_nothing(activations: Array) -> None:
    return None


def _voting(core: CoreConfig, prompts: Prompts, config: ModelConfig) -> Voting:
    return make_voting(_counted(core, prompts, config), config.mlp_size, core.alpha, core.budget)


def _counted(core: CoreConfig, prompts: Prompts, config: ModelConfig) -> np.ndarray:
    """Which tokens vote: bool [B, T], not padding, and not a leading BOS where the setting excludes it."""
    counted = np.arange(prompts.tokens.shape[1])[None, :] < prompts.lengths[:, None]
    if not core.count_bos and config.bos_id is not None:
        counted[:, 0] &= prompts.tokens[:, 0] != config.bos_id
    return counted


def _check_choice(core: CoreConfig, prompts: Prompts, config: ModelConfig) -> None:
    if not _narrowed_layers(core, config):
        raise CoreInferError(f"layers={core.layers} selects none of the model's {config.num_layers} layers; widen it")
    if not _counted(core, prompts, config).any(axis=1).all():
        raise CoreInferError("a prompt of BOS alone has no token to vote with count_bos=False: lengthen it")


def _check_rows(core: CoreNeurons, rows: int) -> None:
    if core.rows not in (None, rows):
        raise CoreInferError(f"core neurons for {core.rows} rows, but tokens have {rows}; give one set [K] or {rows}")


def _check_finite(finite: Array) -> None:
    if not bool(finite):
        raise CoreInferError(
            "logits are NaN or infinite: check the checkpoint, or use --dtype float32 (dtype='float32')"
        )


def _narrowed_layers(core: CoreConfig, config: ModelConfig) -> tuple[int, ...]:
    return tuple(l for l in range(config.num_layers) if core.narrows(l, config.num_layers))


def _indices(
    core: CoreConfig | CoreNeurons | None, votes: list[Votes], config: ModelConfig, rows: int
) -> Indices | None:
    """One index array per layer on the device; a single row's set is shared, so that it runs the plain program."""
    if core is None:
        return None
    if isinstance(core, CoreNeurons):
        single = core.row(0) if core.rows == 1 else core
        return tuple(None if indices is None else jnp.asarray(indices) for indices in single.layers)
    kept = kept_neurons(core.beta, config.mlp_size)
    chosen = _select(votes, kept=kept, shared=not core.per_row or rows == 1)
    by_layer = dict(zip(_narrowed_layers(core, config), chosen, strict=True))
    return tuple(by_layer.get(l) for l in range(config.num_layers))


@partial(jax.jit, static_argnames=("kept", "shared"))
def _select(votes: list[Votes], *, kept: int, shared: bool) -> list[Array]:
    return [most_voted(pooled(layer) if shared else layer, kept) for layer in votes]
