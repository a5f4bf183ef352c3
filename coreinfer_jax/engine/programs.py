"""The compiled programs of generating: prefill, insert a request into a row, decode steps, read given tokens."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from coreinfer_jax.engine.penalties import penalised
from coreinfer_jax.engine.rows import Rows, first_drawn, is_over, put_row, with_token
from coreinfer_jax.engine.sampling import Sampling, draw
from coreinfer_jax.model import MlpPass, extend, observe_nothing, unembed
from coreinfer_jax.model.backends import ANY_ORDER, DECODE_OPTIONS
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.weights import Layer, Mlp, Params
from coreinfer_jax.sparsity.rules import Observer

# Tokens a decode dispatch has room for. How many it makes is data, so streaming in small chunks and generating in
# large ones share a program.
DISPATCH = 64
# Positions whose logits, float32 [B, V] each, are alive at a time while given tokens are scored.
BLOCK = 64


@partial(jax.jit, static_argnames="layers")
def no_sums(observer: Observer, layer: Layer, tokens: Array, *, layers: int) -> list[Any]:
    """What `observer` has summed up of `layers` layers, such as `layer`, before any of tokens [B, T]: zeros."""

    def of_size(size: int) -> Any:
        return jax.ShapeDtypeStruct((*tokens.shape, size), jnp.float32)

    seen = MlpPass(of_size(layer.mlp.up.size_in), *[of_size(layer.mlp.width)] * 2)
    shapes = jax.eval_shape(partial(observer, 0), layer, seen)
    return [jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes) for _ in range(layers)]


# Cache and sums of earlier tokens are donated: the prompt's are added to them in place.
@partial(jax.jit, static_argnames=("observed", "filled"), donate_argnames=("cache", "sums"), compiler_options=ANY_ORDER)
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
        tokens: int32 [B, T], padded.
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

    def observe(l: int, layer: Layer, own: MlpPass) -> Any:
        return None if observer is None or l not in observed else observer(l, layer, own)

    hidden, cache, seen = extend(params, tokens, cache, start, observe, filled=filled)
    logits = unembed(params, hidden[jnp.arange(tokens.shape[0]), lengths - 1][:, None])[:, 0]
    first = draw(penalised(logits, sampling, history, start + lengths), sampling, jnp.zeros_like(lengths))
    rows = first_drawn(cache, logits, first, start + lengths, sampling, history)
    return rows, jax.tree.map(jnp.add, sums, [seen[l] for l in observed]), logits


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
