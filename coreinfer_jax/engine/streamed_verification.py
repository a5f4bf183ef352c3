"""Lossless decoding of a model whose MLPs stay on the host: each pass that verifies drafts moves all of them once.

What `verification.decode_drafted` does in one program is done by a loop of the host here: one program drafts, the full
model reads the drafts layer by layer, and another program keeps what it agrees with.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.engine.drafting import Plan
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.streamed import StreamedPass, extend_streamed
from coreinfer_jax.engine.verification import Drafted, Progress, draft, keep_agreed, no_progress, planned_next
from coreinfer_jax.model.backends import DECODE_OPTIONS
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.decoder import finish
from coreinfer_jax.model.host import without_layers
from coreinfer_jax.model.weights import Mlp, Params

NO_CACHE = KVCache((), ())


def decode_drafted_streamed(
    params: Params,
    narrow: Params | None,
    there: Mapping[int, Mlp],
    state: Drafted,
    tokens: np.integer,
    costs: Array,
    forced: np.integer,
    *,
    size: int,
) -> tuple[Drafted, Array, Array]:
    """`verification.decode_drafted` of a model whose MLPs stay on the host, but for those that are `there` already."""
    rest, loop = without_layers(params), begun(state, size=size)
    while np.array(loop.count).max() < tokens and not np.array(loop.state.rows.done).all():
        loop, plan, read, valid = draft_next(narrow, loop, costs, forced, size=size)
        rows = loop.state.rows
        # What is not verified is not read; slicing on the host compiles nothing.
        read = np.array(read) if np.array(plan.verifies) else np.array(read)[:, :1]
        lengths = np.full(len(read), read.shape[1], np.int32)
        # Kept apart, as it is donated layer by layer.
        loop, cache = without_cache(loop), rows.cache
        x, cache, _ = extend_streamed(StreamedPass(params, read, lengths, rows.position, there=there), cache)
        loop = keep(rest, loop, plan, read, valid, cache, x)
    return loop.state, loop.made, loop.count


def without_cache(loop: Progress) -> Progress:
    """`loop` but for its keys and values."""
    rows: Rows = replace(loop.state.rows, cache=NO_CACHE)
    return replace(loop, state=replace(loop.state, rows=rows))


# The state is donated, here and below: its cache is extended in place.
@partial(jax.jit, static_argnames="size", donate_argnames="state")
def begun(state: Drafted, *, size: int) -> Progress:
    """A dispatch in which nothing is made yet."""
    return no_progress(state, size)


@partial(jax.jit, static_argnames="size", donate_argnames="loop", compiler_options=DECODE_OPTIONS)
def draft_next(
    narrow: Params | None, loop: Progress, costs: Array, forced: Array | np.integer, *, size: int
) -> tuple[Progress, Plan, Array, Array]:
    """`loop` and a plan; each row's token and its drafts, int32 [B, n + 1]; how many drafts these are, int32 [B]."""
    plan, looked_up = planned_next(loop.state, costs, forced, size)
    state, drafts, valid = draft(narrow, loop.state, plan, looked_up)
    return replace(loop, state=state), plan, jnp.concatenate([state.rows.token[:, None], drafts], axis=1), valid


@partial(jax.jit, donate_argnames=("loop", "cache"), compiler_options=DECODE_OPTIONS)
def keep(rest: Params, loop: Progress, plan: Plan, tokens: Array, valid: Array, cache: KVCache, x: Array) -> Progress:
    """`loop`, without its cache, after a pass over tokens [B, m + 1] whose last layer made x [B, m + 1, D]."""
    return keep_agreed(rest, loop, plan, tokens, valid, cache, finish(rest, x))
