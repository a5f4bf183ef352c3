"""The compiled programs of generating: prefill, insert a request into a row, decode steps, read given tokens."""

from dataclasses import dataclass, replace
from functools import partial
from math import gcd, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from coreinfer_jax.engine.penalties import penalised
from coreinfer_jax.engine.rows import Rows, first_drawn, is_over, put_row, with_token
from coreinfer_jax.engine.sampling import Sampling, draw
from coreinfer_jax.model import MlpPass, extend, observe_nothing, unembed
from coreinfer_jax.model.backends import ANY_ORDER, DECODE_OPTIONS, PIECES_OPTIONS
from coreinfer_jax.model.cache import KVCache, bucket
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.layers import KEYS_PER_BLOCK
from coreinfer_jax.model.shards import WHOLE, constrained, on_shards, over_shards, specs
from coreinfer_jax.model.weights import Layer, Mlp, Params
from coreinfer_jax.sparsity.rules import Observer, Summed

# Tokens a decode dispatch has room for. How many it makes is data, so streaming in small chunks and generating in
# large ones share a program.
DISPATCH = 64
# Positions whose logits, float32 [B, V] each, are alive at a time while given tokens are scored.
BLOCK = 64
# Tokens of all rows that a long prefill reads at a time, and the fewest of a row.
PIECE, LEAST_PIECE = 512, 64


@partial(jax.jit, static_argnames=("layers", "mesh"))
def no_sums(observer: Observer, layer: Layer, tokens: Array, *, layers: int, mesh: Mesh | None = None) -> list[Any]:
    """What `observer` has summed up of `layers` layers, such as `layer`, before any of tokens [B, T]: zeros."""

    def of_size(size: int) -> Any:
        return jax.ShapeDtypeStruct((*tokens.shape, size), jnp.float32)

    seen = MlpPass(of_size(layer.mlp.up.size_in), *[of_size(layer.mlp.width)] * 2)
    shapes = jax.eval_shape(partial(observer, 0), layer, seen)
    nothing = [jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes) for _ in range(layers)]
    made: list[Any] = constrained(Summed(nothing), mesh).sums
    return made


# Cache and sums of earlier tokens are donated: the prompt's are added to them in place.
@partial(
    jax.jit,
    static_argnames=("observed", "filled"),
    donate_argnames=("cache", "sums"),
    compiler_options=PIECES_OPTIONS,
)
def prefill(
    params: Params,
    tokens: Array,
    lengths: Array,
    start: Array,
    cache: KVCache,
    sums: list[Any],
    sampling: Sampling,
    observer: Observer | None,
    history: Array | None = None,
    *,
    observed: tuple[int, ...],
    filled: int,
) -> tuple[Rows, list[Any], Array]:
    """Read prompts, add the sums of layers `observed`, draw the next token from the full model's logits [B, V].

    Args:
        params: dense weights.
        tokens: int32 [B, T], padded to a bucket.
        lengths: int32 [B], tokens per row before padding.
        start: int32 [B], tokens per row that were read before.
        cache: what those left, with room for the prompts.
        sums: theirs, one entry per layer of `observed`.
        sampling: how to draw, and where rows end.
        observer: what to sum up; None for nothing.
        history: int32 [B, S], all tokens that were and are to be read; None where `sampling` looks at none.
        observed: layers.
        filled: at least start + T of every row, the positions to attend to.
    """
    add = over_shards(
        partial(_prefill, observed=observed, filled=filled),
        params.mesh,
        results=(WHOLE, specs(cache), specs(Summed(sums))),
    )
    logits, cache, summed = add(params, tokens, lengths, start, cache, Summed(sums), observer)
    first = draw(penalised(logits, sampling, history, start + lengths), sampling, jnp.zeros_like(lengths))
    return first_drawn(cache, logits, first, start + lengths, sampling, history), summed.sums, logits


def _prefill(
    params: Params,
    tokens: Array,
    lengths: Array,
    start: Array,
    cache: KVCache,
    summed: Summed,
    observer: Observer | None,
    *,
    observed: tuple[int, ...],
    filled: int,
) -> tuple[Array, KVCache, Summed]:
    """What `prefill` reads: logits float32 [B, V] of each row's last token, the extended cache, and the sums."""
    reading, sums = Reading(params, tokens, start, observer, observed), summed.sums
    if reads_at_once(tokens.shape, filled, observer):
        hidden, cache, sums = _add_piece(reading, cache, sums, filled=filled)
        last = hidden[jnp.arange(tokens.shape[0]), lengths - 1]
    else:
        last, cache, sums = _add_pieces(reading, lengths, cache, sums)
    return unembed(params, last[:, None])[:, 0], cache, Summed(sums)


@dataclass(frozen=True)
class Reading:
    """Tokens to be read by a pass within a compiled program; arguments of `prefill`."""

    params: Params
    tokens: Array
    start: Array
    observer: Observer | None
    observed: tuple[int, ...]

    def piece(self, first: Array, size: int) -> "Reading":
        """The `size` tokens of each row from its token `first`, int32 [], on."""
        return replace(
            self,
            tokens=lax.dynamic_slice_in_dim(self.tokens, first, size, axis=1),
            start=self.start + first,
            observer=None if self.observer is None else self.observer.piece(first, size),
        )


def reads_at_once(shape: tuple[int, ...], filled: int, observer: Observer | None) -> bool:
    """Whether tokens of `shape` [B, T] that see `filled` slots are read in one pass: few, or not to be told apart."""
    return (observer is not None and not observer.adds_up) or prod(shape) * filled <= PIECE * PIECE


def piece_size(rows: int, tokens: int) -> int:
    """How many of each row's `tokens` (T) are read at a time: some `PIECE` of all rows, a divisor of T."""
    return gcd(tokens, max(LEAST_PIECE, PIECE // bucket(rows, 1)))


def prefill_bytes(config: ModelConfig, shape: tuple[int, ...], filled: int, observer: Observer | None) -> int:
    """Bytes of temporaries that a `prefill` of tokens of `shape` [B, T] needs at least; arguments of `reads_at_once`.

    The larger of scores and their softmax, and of two arrays of an MLP's activations, all float32.
    """
    B, T = shape
    at_once = reads_at_once(shape, filled, observer)
    tokens, keys = (B * T, filled) if at_once else (B * piece_size(B, T), min(filled, KEYS_PER_BLOCK))
    return 2 * 4 * tokens * max(config.num_heads * keys, config.mlp_size)


def _add_pieces(reading: Reading, lengths: Array, cache: KVCache, sums: list[Any]) -> tuple[Array, KVCache, list[Any]]:
    """Hidden states [B, E] of each row's last token, the extended cache, the sums with those of all tokens.

    Pieces that are nothing but padding are not read.
    """
    B, T = reading.tokens.shape
    size = piece_size(B, T)

    def add(i: Array, read: tuple[Array, KVCache, list[Any]]) -> tuple[Array, KVCache, list[Any]]:
        last, cache, sums = read
        hidden, cache, sums = _add_piece(reading.piece(i * size, size), cache, sums, in_blocks=True)
        index = lengths - 1 - i * size
        is_here = (index >= 0) & (index < size)
        return jnp.where(is_here[:, None], hidden[jnp.arange(B), index % size], last), cache, sums

    none_yet = jnp.zeros((B, reading.params.config.embed_size), reading.params.dtype)
    return lax.fori_loop(0, -(-lengths.max() // size), add, (none_yet, cache, sums))


def _add_piece(
    reading: Reading, cache: KVCache, sums: list[Any], filled: int | None = None, in_blocks: bool = False
) -> tuple[Array, KVCache, list[Any]]:
    """Hidden states [B, T, E], the extended cache, the sums with those of these tokens."""
    observer, observed = reading.observer, reading.observed

    def observe(l: int, layer: Layer, own: MlpPass) -> Any:
        return None if observer is None or l not in observed else observer(l, layer, own)

    hidden, cache, seen = extend(
        reading.params, reading.tokens, cache, reading.start, observe, filled=filled, in_blocks=in_blocks
    )
    return hidden, cache, jax.tree.map(jnp.add, sums, [seen[l] for l in observed])


# The state is donated: the other rows stay where they are.
@partial(jax.jit, donate_argnames="rows")
def insert(rows: Rows, row: Array | np.integer, one: Rows) -> Rows:
    """`rows` with the only row of `one`, a request that was prefilled alone, as its row `row`, int32 []."""
    return put_row(rows, row, one)


@partial(jax.jit, donate_argnames="mlps")
def insert_mlps(mlps: list[Mlp], row: Array | np.integer, one: list[Mlp]) -> list[Mlp]:
    """MLPs narrowed per row, with those of `one`, narrowed to a single set of the same widths, for row `row`.

    All rows share what makes the linear neurons' activations.
    """

    def put(per_row: Mlp, own: Mlp) -> Mlp:
        apart = replace(per_row, linear=None), replace(own, linear=None)
        return replace(jax.tree.map(lambda rows, new: rows.at[row].set(new), *apart), linear=per_row.linear)

    return [put(*layer) for layer in zip(mlps, one, strict=True)]


# The cache is donated: each dispatch extends it in place.
@partial(jax.jit, donate_argnames="rows", compiler_options=DECODE_OPTIONS)
@on_shards(lambda params, rows, *_: (specs(rows), WHOLE, WHOLE))
def decode(params: Params, rows: Rows, steps: Array | np.integer) -> tuple[Rows, Array, Array]:
    """Up to `steps` decode steps, fewer once every row is complete.

    Returns:
        The rows, the tokens drawn, int32 [B, 64], and how many steps were run, int32 [].
    """
    drawn = jnp.zeros((rows.token.shape[0], DISPATCH), jnp.int32)

    def unfinished(loop: tuple[Array, Rows, Array]) -> Array:
        i, rows, _ = loop
        return (i < steps) & ~rows.done.all()

    def step(loop: tuple[Array, Rows, Array]) -> tuple[Array, Rows, Array]:
        i, rows, drawn = loop
        rows = _decode_one(params, rows)
        return i + 1, rows, drawn.at[:, i].set(rows.token)

    run, rows, drawn = lax.while_loop(unfinished, step, (jnp.int32(0), rows, drawn))
    return rows, drawn, run


def _decode_one(params: Params, rows: Rows) -> Rows:
    hidden, cache, _ = extend(params, rows.token[:, None], rows.cache, rows.position, observe_nothing)
    return next_drawn(params, rows, cache, hidden)


def next_drawn(params: Params, rows: Rows, cache: KVCache, hidden: Array) -> Rows:
    """The rows after a step that read their `token`: the extended cache, and hidden states [B, 1, E] to draw from."""
    logits = unembed(params, hidden)[:, 0]
    history = with_token(rows)
    drawn = draw(penalised(logits, rows.sampling, history, rows.position + 1), rows.sampling, rows.length)
    token = jnp.where(rows.done, rows.sampling.fill, drawn)
    running = (~rows.done).astype(jnp.int32)
    length = rows.length + running
    return replace(
        rows,
        cache=cache,
        token=token,
        # A complete row stays where it is, so that it never runs off the end of the cache.
        position=rows.position + running,
        length=length,
        done=rows.done | is_over(token, length, rows.sampling),
        finite=rows.finite & (jnp.isfinite(logits).all(axis=-1) | rows.done),
        history=history,
    )


@partial(jax.jit, compiler_options=ANY_ORDER)
@on_shards(lambda *_: (WHOLE, WHOLE))
def score_given(params: Params, cache: KVCache, start: Array, first: Array, tokens: Array) -> tuple[Array, Array]:
    """Log-probabilities float32 [B, T] of given tokens, and whether each was the most probable, bool [B, T].

    Args:
        params: narrowed or dense weights.
        cache: of what stands before.
        start: int32 [B], where the tokens start.
        first: float32 [B, V], logits of the first one.
        tokens: int32 [B, T], padded, T a power of two.
    """
    B, T = tokens.shape
    hidden, _, _ = extend(params, tokens, cache, start, observe_nothing)
    block = min(T, BLOCK)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        return _score(unembed(params, part[0]), part[1])

    parts = hidden.reshape(B, T // block, block, -1), jnp.roll(tokens, -1, axis=1).reshape(B, T // block, block)
    scored = lax.map(score, jax.tree.map(lambda part: part.swapaxes(0, 1), parts))
    later = jax.tree.map(lambda part: part.swapaxes(0, 1).reshape(B, T)[:, :-1], scored)
    return jax.tree.map(
        lambda one, rest: jnp.concatenate([one, rest], axis=1), _score(first[:, None], tokens[:, :1]), later
    )


def _score(logits: Array, tokens: Array) -> tuple[Array, Array]:
    """Of logits [B, T, V]: the log-probabilities of `tokens` [B, T], and whether they are the most probable."""
    own = jnp.take_along_axis(logits, tokens[:, :, None], axis=-1)[:, :, 0]
    return own - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == tokens
