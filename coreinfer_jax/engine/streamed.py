"""Passes of a model whose MLPs stay on the host: layer by layer, each on the device while it is in use.

They compute what `model.extend`, `programs.prefill` and `programs.decode` compute. A pass moves each MLP once, whatever
the number of its tokens; the next one is read and copied while the device works on the last.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from coreinfer_jax.engine.penalties import penalised
from coreinfer_jax.engine.programs import DISPATCH, next_drawn, piece_size, reads_at_once
from coreinfer_jax.engine.rows import Rows, first_drawn
from coreinfer_jax.engine.sampling import Sampling, draw
from coreinfer_jax.model import MlpPass, unembed
from coreinfer_jax.model.backends import PIECES_OPTIONS
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.decoder import embed, extend_layer, finish, first_alike
from coreinfer_jax.model.host import layers_on_device, without_layers
from coreinfer_jax.model.weights import Layer, Mlp, Params
from coreinfer_jax.sparsity.rules import Observer

# What is made of a layer's number, its weights on the device and the sums over its tokens.
AtHand = Callable[[int, Layer, Any], Any]


@dataclass(frozen=True)
class StreamedPass:
    """Tokens to be read by a model whose MLPs stay on the host.

    Attributes:
        params: the model.
        tokens: int32 [B, T].
        lengths: int32 [B], tokens per row before padding.
        start: int32 [B], position of each row's first token.
        observer: what to sum up; None for nothing.
        observed: layers whose sums are wanted.
        filled: positions to attend to where all tokens are read at once; None for all of the cache.
        size: how many tokens of each row are read at a time, a divisor of T; all sums are made of such pieces.
        there: MLPs that are on the device already, by the layers' numbers.
    """

    params: Params
    tokens: np.ndarray | Array
    lengths: np.ndarray | Array
    start: np.ndarray | Array
    observer: Observer | None = None
    observed: tuple[int, ...] = ()
    filled: int | None = None
    size: int | None = None
    there: Mapping[int, Mlp] | None = None


def pass_of_prefill(
    params: Params,
    tokens: np.ndarray,
    lengths: np.ndarray,
    start: np.ndarray,
    observer: Observer | None,
    observed: tuple[int, ...],
    filled: int,
    there: Mapping[int, Mlp],
) -> StreamedPass:
    """The pass that reads prompts as `programs.prefill` does, in the same pieces."""
    at_once = reads_at_once(tokens.shape, filled, observer)
    size = tokens.shape[1] if at_once else piece_size(*tokens.shape)
    return StreamedPass(params, tokens, lengths, start, observer, observed, filled if at_once else None, size, there)


def extend_streamed(
    reading: StreamedPass, cache: KVCache, sums: list[Any] | None = None, at_hand: AtHand | None = None
) -> tuple[Array, KVCache, list[Any]]:
    """What `model.extend` makes of tokens, with each MLP moved to the device once.

    Args:
        reading: what is read.
        cache: of the tokens before, with room for these; its memory is used again.
        sums: of the tokens before, one entry per layer of `reading.observed`; None for none. Their memory too.
        at_hand: called as `at_hand(l, layer, sums)` for each observed layer while its weights are on the device; what
            it returns is awaited before these go.

    Returns:
        What the last layer makes, [B, T, D], for `decoder.finish`; the extended cache; the sums with those of these
        tokens.
    """
    params, rest, observed = reading.params, without_layers(reading.params), reading.observed
    earlier = dict(zip(observed, sums or [None] * len(observed), strict=True))
    like, T = first_alike(params.config), reading.tokens.shape[1]
    x = embed_tokens(rest, reading.tokens, reading.start, capacity=cache.capacity)
    keys, values, made, of_weights = list(cache.keys), list(cache.values), {}, None
    with closing(layers_on_device(params, reading.there or {})) as layers:
        for l, layer in enumerate(layers):
            # From here on the MLP before this one is free, and the next may come.
            jax.block_until_ready((x, of_weights))
            observer = reading.observer.of_layer(l) if reading.observer is not None and l in observed else None
            x, (keys[l], values[l]), own = through_layer(
                rest,
                layer,
                x,
                (keys[l], values[l]),
                earlier.get(l),
                reading.start,
                reading.lengths,
                observer,
                like=like[l],
                filled=reading.filled,
                size=reading.size or T,
            )
            if l in observed:
                made[l] = own
                of_weights = None if at_hand is None else at_hand(l, layer, own)
    # What comes next is planned with the room of both MLPs: it must not start while the last layer's is in use.
    jax.block_until_ready((x, of_weights))
    return x, KVCache(tuple(keys), tuple(values)), [made[l] for l in observed]


@partial(jax.jit, static_argnames="capacity")
def embed_tokens(rest: Params, tokens: Array, start: Array, *, capacity: int) -> Array:
    """What the first layer reads, [B, T, D]."""
    return embed(rest, tokens, start, capacity)


# What was there before is donated: hidden states, cache and sums are as large after the layer.
@partial(
    jax.jit,
    static_argnames=("like", "filled", "size"),
    donate_argnames=("x", "past", "sums"),
    compiler_options=PIECES_OPTIONS,
)
def through_layer(
    rest: Params,
    layer: Layer,
    x: Array,
    past: tuple[Array, Array],
    sums: Any,
    start: Array,
    lengths: Array,
    observer: Observer | None,
    *,
    like: int,
    filled: int | None,
    size: int,
) -> tuple[Array, tuple[Array, Array], Any]:
    """One layer over x [B, T, D], `size` tokens of each row at a time: the new x, its keys and values, its sums.

    Layers of equal shapes that are alike (`first_alike`) share the program. Pieces of nothing but padding are not read.
    """
    in_blocks = size < x.shape[1]

    def read(x: Array, past: tuple[Array, Array], first: Array | int) -> tuple[Array, tuple[Array, Array], Any]:
        own = observer if observer is None or not in_blocks else observer.piece(jnp.asarray(first), size)

        def observe(l: int, layer: Layer, seen: MlpPass) -> Any:
            return None if own is None else own(l, layer, seen)

        return extend_layer(rest, like, layer, x, past, start + first, observe, filled, in_blocks)

    if not in_blocks:
        x, past, own = read(x, past, 0)
        return x, past, own if sums is None else jax.tree.map(jnp.add, sums, own)

    def add(i: Array, made: tuple[Array, tuple[Array, Array], Any]) -> tuple[Array, tuple[Array, Array], Any]:
        x, past, sums = made
        piece, past, own = read(lax.dynamic_slice_in_dim(x, i * size, size, axis=1), past, i * size)
        x = lax.dynamic_update_slice_in_dim(x, piece, i * size, axis=1)
        return x, past, jax.tree.map(jnp.add, sums, own)

    if sums is None:
        shapes = jax.eval_shape(read, x[:, :size], past, jnp.int32(0))[2]
        sums = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)
    return lax.fori_loop(0, -(-lengths.max() // size), add, (x, past, sums))


# The cache is donated: it goes into the rows as it is.
@partial(jax.jit, donate_argnames="cache")
def first_token(
    rest: Params,
    x: Array,
    lengths: Array,
    start: Array,
    cache: KVCache,
    sampling: Sampling,
    history: Array | None,
) -> tuple[Rows, Array]:
    """Rows whose first token is drawn from the logits [B, V] after each row's last token of x [B, T, D], and these."""
    last = finish(rest, x[jnp.arange(x.shape[0]), lengths - 1][:, None])
    logits = unembed(rest, last)[:, 0]
    first = draw(penalised(logits, sampling, history, start + lengths), sampling, jnp.zeros_like(lengths))
    return first_drawn(cache, logits, first, start + lengths, sampling, history), logits


@partial(jax.jit, donate_argnames=("rows", "cache"))
def next_token(rest: Params, rows: Rows, cache: KVCache, x: Array) -> Rows:
    """The rows after a step whose last layer made x [B, 1, D]; `rows` come without their cache."""
    return next_drawn(rest, rows, cache, finish(rest, x))


def decode_streamed(params: Params, rows: Rows, steps: int) -> tuple[Rows, np.ndarray, int]:
    """`programs.decode` of a model whose MLPs stay on the host: each step moves all of them.

    Returns:
        The rows, the tokens drawn, int32 [B, 64], and how many steps were run.
    """
    rest, ones = without_layers(params), np.ones(rows.token.shape[0], np.int32)
    drawn, run = np.zeros((rows.token.shape[0], DISPATCH), np.int32), 0
    while run < steps and not np.array(rows.done).all():
        # Kept apart, as it is donated layer by layer.
        cache, nothing = rows.cache, KVCache((), ())
        x, cache, _ = extend_streamed(StreamedPass(params, rows.token[:, None], ones, rows.position), cache)
        rows = next_token(rest, replace(rows, cache=nothing), cache, x)
        drawn[:, run] = np.array(rows.token)
        run += 1
    return rows, drawn, run
