"""The compiled program of lossless decoding: draft, let the full model read the drafts, keep what it agrees with.

A drafted token is kept where the full model makes the same one. It makes them with the random numbers that it has for
each place of a row, whoever drafted. So the tokens are those of plain decoding with the full model and the same key,
also when they are drawn (drafter-invariant speculative decoding: Daliri et al. 2024, arXiv 2408.07978). Rejection
sampling (Leviathan et al. 2023) would keep the distribution alone, and its tokens would depend on the drafts.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from coreinfer_jax.engine.drafting import (
    CORE,
    DRAFTERS,
    LOOKUP,
    REMEMBERED,
    Plan,
    Trust,
    draft_by_core,
    look_up,
    no_experience,
    plan_next,
    put_tokens,
)
from coreinfer_jax.engine.penalties import penalised
from coreinfer_jax.engine.programs import DISPATCH
from coreinfer_jax.engine.rows import Rows, with_token
from coreinfer_jax.engine.sampling import draw
from coreinfer_jax.model import MlpPass, extend, observe_nothing, unembed
from coreinfer_jax.model.backends import DECODE_OPTIONS, write
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.shards import WHOLE, along, on_shards, specs
from coreinfer_jax.model.weights import Layer, Params

# What may be lost, at most, of the time that the full model alone takes.
LOSS = 0.03


def watched_places(size: int) -> int:
    """Tokens of a row that there must be room for, where up to `size` (n) are drafted at a time."""
    return DISPATCH + size


@struct.dataclass
class Watched:
    """What the full model's MLPs made of each row's latest tokens, with room for W of them, and what this has cost.

    As in a cache, what rejected drafts leave behind a row's text is overwritten by its next tokens. All layers are in
    one array: a pass then writes twice, and not twice per layer.

    Attributes:
        inputs: [B, L, W, D], what the MLPs of the observed layers (L) read.
        activations: [B, L, W, F], what their neurons made of it.
        start: int32 [B], the position of the first of these tokens.
        taken: float32 [], what core neurons that follow the text took so far, in passes over one token.
        layers: the observed ones.
    """

    inputs: Array
    activations: Array
    start: Array
    taken: Array
    layers: tuple[int, ...] = struct.field(pytree_node=False)

    def specs(self) -> "Watched":
        """Neurons are spread over devices."""
        return replace(self, inputs=WHOLE, activations=along(3, 4), start=WHOLE, taken=WHOLE)

    def observe(self, l: int, layer: Layer, seen: MlpPass) -> MlpPass | None:
        """The `observe` of `extend`, for `with_pass`."""
        return seen if l in self.layers else None

    def with_pass(self, passes: Sequence[MlpPass | None], position: Array) -> "Watched":
        """`passes` of all layers over tokens [B, T] put in, those from `position` int32 [B] on."""
        own = [seen for seen in passes if seen is not None]
        inputs, activations = ([getattr(seen, name) for seen in own] for name in ("inputs", "activations"))
        places = (position - self.start)[:, None] + jnp.arange(inputs[0].shape[1])[None, :]
        return replace(
            self,
            inputs=write(self.inputs, jnp.stack(inputs, axis=2), places),
            activations=write(self.activations, jnp.stack(activations, axis=2), places),
        )


@struct.dataclass
class Drafted:
    """Rows whose drafts are verified, and what has come of the drafts; n tokens are drafted at most.

    Attributes:
        rows: in whose cache are the full model's keys and values; they hold their history.
        trust: in the drafters.
        single: int32 [], passes of the full model over one token per row.
        verified: int32 [], passes that verified drafts.
        core_steps: int32 [], steps of narrowed weights.
        reached: int32 [2, n], by drafter and place: drafted tokens before which all were accepted.
        accepted: int32 [2, n], those of them that were accepted too.
        watched: what core neurons are chosen anew from; None where they stay.
    """

    rows: Rows
    trust: Trust
    single: Array
    verified: Array
    core_steps: Array
    reached: Array
    accepted: Array
    watched: Watched | None = None


def nothing_drafted(rows: Rows, size: int, watched: Watched | None = None) -> Drafted:
    """`rows` before any draft of `size` (n) tokens."""
    by_place = np.zeros((len(DRAFTERS), size), np.int32)
    # Arrays of their own: the state is donated.
    single, verified, core_steps, reached, accepted = map(jnp.asarray, (0, 0, 0, by_place, by_place))
    trust = no_experience(rows.token.shape[0])
    return Drafted(rows, trust, single, verified, core_steps, reached, accepted, watched)


# The state is donated: each dispatch extends the cache in place.
@partial(jax.jit, donate_argnames="state", static_argnames="size", compiler_options=DECODE_OPTIONS)
@on_shards(lambda params, narrow, state, *_: (specs(state), WHOLE, WHOLE))
def decode_drafted(
    params: Params,
    narrow: Params | None,
    state: Drafted,
    tokens: Array | np.integer,
    costs: Array,
    forced: Array | np.integer,
    *,
    size: int,
) -> tuple[Drafted, Array, Array]:
    """Draft and verify until some row has `tokens` new ones, at most 64, or every row is complete.

    Args:
        params: dense weights.
        narrow: the same narrowed to core neurons, or None to draft by lookup alone.
        state: of the rows.
        tokens: int32 [].
        costs: float32 [2], as `plan_next` takes them.
        forced: int32 [], as `plan_next` takes it.
        size: tokens drafted at most (n), as those of `state`.

    Returns:
        The state; the new tokens of each row, int32 [B, 64 + n], from the left; how many they are, int32 [B].
    """

    def planned(loop: Progress) -> tuple[Plan, Array]:
        return planned_next(loop.state, costs, forced, size)

    def unfinished(loop: Progress) -> Array:
        return (loop.count.max() < tokens) & ~loop.state.rows.done.all()

    def read_one(loop: Progress) -> Progress:
        plan, drafts = planned(loop)
        return read_drafts(params, loop, plan, drafts[:, :0], jnp.zeros_like(loop.count))

    def verify(loop: Progress) -> Progress:
        plan, looked_up = planned(loop)
        state, drafts, valid = draft(narrow, loop.state, plan, looked_up)
        return read_drafts(params, replace(loop, state=state), plan, drafts, valid)

    # Two loops in a loop: XLA's CPU code copies the whole cache for the branches of a conditional.
    def go_on(loop: Progress) -> Progress:
        loop = lax.while_loop(lambda loop: unfinished(loop) & ~planned(loop)[0].verifies, read_one, loop)
        return lax.while_loop(lambda loop: unfinished(loop) & planned(loop)[0].verifies, verify, loop)

    loop = lax.while_loop(unfinished, go_on, no_progress(state, size))
    return loop.state, loop.made, loop.count


@struct.dataclass
class Progress:
    """A dispatch in progress: the state, the new tokens int32 [B, 64 + n], and how many they are, int32 [B]."""

    state: Drafted
    made: Array
    count: Array


def no_progress(state: Drafted, size: int) -> Progress:
    """A dispatch that drafts `size` (n) tokens at most, before its first pass."""
    rows = state.rows
    made = jnp.broadcast_to(rows.sampling.fill[:, None], (len(rows.token), DISPATCH + size))
    state = replace(state, rows=replace(rows, history=with_token(rows)))
    return Progress(state, made, jnp.zeros(len(rows.token), jnp.int32))


def planned_next(state: Drafted, costs: Array, forced: Array | np.integer, size: int) -> tuple[Plan, Array]:
    """What comes next, and what was looked up, int32 [B, n]."""
    assert state.rows.history is not None, "rows that verify drafts hold their texts"
    drafts, found = look_up(state.rows.history, state.rows.position, size)
    spare = spare_time(state, costs)
    return plan_next(state.trust, found, state.rows.done, costs, spare, forced, size), drafts


@jax.jit
def spare_time(state: Drafted, costs: Array) -> Array:
    """What may still be lost, in passes over one token, float32 []; infinite where all rows are complete.

    So much may be lost altogether: the share `LOSS` of what the full model alone takes for the tokens so far and up to
    64 more, no more than each row's budget. Lost is what all passes took, and choosing and gathering anew, less a pass
    for each token of the row that has made fewest: the full model alone would have taken these, and will take as many
    for the rest.

    Args:
        state: of the rows.
        costs: float32 [2], as `plan_next` takes them.
    """
    rows = state.rows
    in_sight = jnp.where(rows.done, rows.length, jnp.minimum(rows.sampling.budget, rows.length + DISPATCH))
    passes = jnp.stack([state.single, state.verified, state.core_steps]).astype(jnp.float32)
    taken = passes[0] + passes[1] * costs[0] + passes[2] * costs[1]
    if state.watched is not None:
        taken += state.watched.taken
    needed = jnp.where(rows.done, jnp.inf, (rows.length - 1).astype(jnp.float32)).min()
    return LOSS * (in_sight.max() - 1).astype(jnp.float32) - (taken - needed)


def draft(narrow: Params | None, state: Drafted, plan: Plan, looked_up: Array) -> tuple[Drafted, Array, Array]:
    """What is drafted by a plan, where [B, n] tokens were looked up.

    Returns:
        The state, its cache with what narrowed weights wrote; the drafts, int32 [B, n]; how many of them, int32 [B].
    """
    rows, size = state.rows, looked_up.shape[1]
    drafts, valid = looked_up, jnp.where(plan.looks_up, size, 0)
    if narrow is not None:
        cache, by_core = draft_by_core(narrow, rows, plan.core_steps, size)
        state = replace(state, rows=replace(rows, cache=cache))
        drafts = jnp.where(plan.looks_up[:, None], looked_up, by_core)
        valid = jnp.where(plan.looks_up, size, plan.core_steps)
    return state, drafts, jnp.where(rows.done, 0, valid)


def read_drafts(params: Params, loop: Progress, plan: Plan, drafts: Array, valid: Array) -> Progress:
    """`loop` after one pass of the full model over each row's token and its drafts [B, m], `valid` [B] of them.

    Its keys and values replace those that narrowed weights wrote for the drafts.
    """
    rows, watched = loop.state.rows, loop.state.watched
    tokens = jnp.concatenate([rows.token[:, None], drafts], axis=1)
    observe = observe_nothing if watched is None else watched.observe
    hidden, cache, seen = extend(params, tokens, rows.cache, rows.position, observe)
    if watched is not None:
        loop = replace(loop, state=replace(loop.state, watched=watched.with_pass(seen, rows.position)))
    return keep_agreed(params, loop, plan, tokens, valid, cache, hidden)


def keep_agreed(
    params: Params, loop: Progress, plan: Plan, tokens: Array, valid: Array, cache: KVCache, hidden: Array
) -> Progress:
    """`loop` with the drafts that a pass of the full model agreed with, and the token that it made after them.

    Args:
        params: dense weights; layers are not looked at.
        loop: before the pass, its cache aside.
        plan: of the drafts.
        tokens: int32 [B, m + 1], each row's token and its drafts.
        valid: int32 [B], how many drafts these are.
        cache: that the pass left.
        hidden: what it made of the tokens, [B, m + 1, E], for `unembed`.
    """
    rows, drafts = loop.state.rows, tokens[:, 1:]
    m = drafts.shape[1]
    new, finite = _made(params, rows, tokens, hidden)
    index = jnp.arange(m)[None, :]
    agrees = (drafts == new[:, :m]) & (index < valid[:, None])
    agreed = jnp.cumprod(agrees.astype(jnp.int32), axis=1).sum(axis=1)
    kept = jnp.where(rows.done, 0, jnp.minimum(agreed, _ends_at(new, rows)) + 1)
    after = _went_on(replace(rows, cache=cache), new, kept, finite)
    reached, accepted = index < jnp.minimum(valid, kept)[:, None], index < jnp.minimum(agreed, kept)[:, None]
    state = _counted(replace(loop.state, rows=after), plan, reached, accepted)
    places = jnp.arange(m + 1)[None, :]
    places = jnp.where(places < kept[:, None], loop.count[:, None] + places, loop.made.shape[1])
    made = loop.made.at[jnp.arange(len(kept))[:, None], places].set(new, mode="drop")
    return Progress(state, made, loop.count + kept)


def _made(params: Params, rows: Rows, tokens: Array, hidden: Array) -> tuple[Array, Array]:
    """What the full model makes after each of tokens [B, m + 1], of which it made `hidden`.

    Returns:
        The tokens, int32 [B, m + 1]; whether their logits are finite, bool [B, m + 1].
    """
    assert rows.history is not None, "rows that verify drafts hold their texts"
    logits = unembed(params, hidden)
    history = put_tokens(rows.history, rows.position, tokens)
    places = jnp.arange(tokens.shape[1])[None, :]
    lowered = jax.vmap(penalised, (1, None, None, 1), 1)(
        logits, rows.sampling, history, rows.position[:, None] + 1 + places
    )
    new = jax.vmap(draw, (1, None, 1), 1)(lowered, rows.sampling, rows.length[:, None] + places)
    return new, jnp.isfinite(logits).all(axis=-1)


def _ends_at(new: Array, rows: Rows) -> Array:
    """The first of tokens [B, m + 1] that completes its row, int32 [B]; m + 1 where none does."""
    index = jnp.arange(new.shape[1])[None, :]
    is_eos = jnp.take_along_axis(rows.sampling.is_eos, new, axis=1)
    ends = is_eos | (rows.length[:, None] + index + 1 >= rows.sampling.budget[:, None])
    return jnp.where(ends, index, new.shape[1]).min(axis=1)


def _went_on(rows: Rows, new: Array, kept: Array, finite: Array) -> Rows:
    """`rows` with the first `kept` [B] of tokens [B, m + 1]: what stands in slots beyond them is never seen."""
    assert rows.history is not None, "rows that verify drafts hold their texts"
    last = jnp.take_along_axis(new, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    over = _ends_at(new, rows) < kept
    unread = jnp.arange(new.shape[1])[None, :] >= kept[:, None]
    return replace(
        rows,
        token=jnp.where(rows.done, rows.sampling.fill, last),
        position=rows.position + kept,
        length=rows.length + kept,
        done=rows.done | over,
        finite=rows.finite & (finite | unread).all(axis=1),
        # Of a complete row too: what stands behind its text is not looked at.
        history=put_tokens(rows.history, rows.position + 1, new),
    )


def _counted(state: Drafted, plan: Plan, reached: Array, accepted: Array) -> Drafted:
    """`state` with one more pass, whose drafts have `reached` and `accepted` bool [B, m] places."""
    by_drafter = jax.nn.one_hot(jnp.where(plan.looks_up, LOOKUP, CORE), len(DRAFTERS), dtype=jnp.int32)

    def fared(before: Array, places: Array) -> Array:
        tokens = places.sum(axis=1, dtype=jnp.float32)[:, None]
        return REMEMBERED * before + by_drafter.astype(jnp.float32) * tokens

    def counted(before: Array, places: Array) -> Array:
        added = jnp.einsum("Bd,Bm->dm", by_drafter, places.astype(jnp.int32))
        return before.at[:, : places.shape[1]].add(added)

    verifies = plan.verifies.astype(jnp.int32)
    return replace(
        state,
        trust=Trust(fared(state.trust.reached, reached), fared(state.trust.accepted, accepted)),
        single=state.single + 1 - verifies,
        verified=state.verified + verifies,
        core_steps=state.core_steps + plan.core_steps,
        reached=counted(state.reached, reached),
        accepted=counted(state.accepted, accepted),
    )
