"""`Rows`: requests in progress, one row of arrays each, in one explicit state."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from coreinfer_jax.engine.sampling import Sampling
from coreinfer_jax.model.cache import KVCache


@struct.dataclass
class Rows:
    """Everything that a decode step carries; rows may differ in all of it.

    Which weights a step reads is not part of it: `Params` narrowed per row hold each row's own neurons, shared ones
    the same for all.

    Attributes:
        cache: keys and values of every token before `token`, [B, G, S, H] per layer.
        token: int32 [B], drawn but not yet run through the model.
        position: int32 [B], where it will stand.
        length: int32 [B], new tokens per row, `token` counted.
        done: bool [B], rows that have drawn an EOS or used up their budget; also rows that hold no request.
        finite: bool [B], whether all logits so far were finite.
        sampling: how each row draws and where it ends.
        history: int32 [B, S], the tokens of `cache` in their places; None where no row's sampling looks at them.
    """

    cache: KVCache
    token: Array
    position: Array
    length: Array
    done: Array
    finite: Array
    sampling: Sampling
    history: Array | None = None


def first_drawn(
    cache: KVCache,
    logits: Array,
    token: Array,
    position: Array,
    sampling: Sampling,
    history: Array | None = None,
) -> Rows:
    """Rows whose first token [B] was drawn from logits [B, V] after `position` [B] tokens, those of `history`."""
    length = jnp.ones_like(token)
    return Rows(
        cache=cache,
        token=token,
        position=position,
        length=length,
        done=is_over(token, length, sampling),
        finite=jnp.isfinite(logits).all(axis=-1),
        sampling=sampling,
        history=history,
    )


def with_token(rows: Rows) -> Array | None:
    """The history with each row's `token` in its place."""
    return None if rows.history is None else rows.history.at[jnp.arange(len(rows.token)), rows.position].set(rows.token)


def is_over(token: Array, length: Array, sampling: Sampling) -> Array:
    """Which rows are complete with `token` [B] as the last of `length` [B] new ones: bool [B]."""
    is_eos = jnp.take_along_axis(sampling.is_eos, token[:, None], axis=1)[:, 0]
    return is_eos | (length >= sampling.budget)


def put_row(rows: Rows, row: Array | np.integer, one: Rows) -> Rows:
    """`rows` with row `row` [] replaced by the only row of `one`, whose cache may hold fewer positions.

    What an earlier request of the row has left behind in the cache lies beyond its new position: it is overwritten
    before it can be seen.
    """

    def put(all_rows: Array, own: Array) -> Array:
        place = (row, *(slice(size) for size in own.shape[1:]))
        return all_rows.at[place].set(own[0])

    return jax.tree.map(put, rows, one)
