"""Drafts of the next tokens, which cost less than the full model's, and which of them are worth a verification.

Two drafters: weights narrowed to core neurons (`core`), and what followed the same n-gram earlier in the text
(`lookup`: prompt lookup decoding, which is free). Arrays that hold something of each have an axis in this order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from coreinfer_jax.engine.penalties import penalised
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.sampling import draw
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.weights import Params

DRAFTERS = ("core", "lookup")
CORE, LOOKUP = range(2)
# Of the n-gram that is looked up. A single token stands everywhere and says little of what follows it.
LONGEST, SHORTEST = 3, 2
# What a drafter is trusted with before it has drafted anything: as if it had drafted so many tokens, and so large a
# share of them had been accepted. It is high, so that each is tried.
PRIOR_TOKENS, PRIOR_SHARE = 1.0, 0.9
# What is left of earlier experience with each further pass. So texts may change, and a drafter that was given up is
# tried again after a hundred tokens or so.
REMEMBERED = 0.97
# Tokens of a row between two looks at how far its text has left the core neurons in use, and those that must be left to
# make after one.
LOOK_EVERY = 32
# Instead of a plan: what costs and trust say is best; a single token.
BEST, SINGLE = -1, 0


@struct.dataclass
class Trust:
    """How drafters have fared, of late.

    Attributes:
        reached: float32 [B, 2], drafted tokens that the full model had a say on: all before them were accepted.
        accepted: float32 [B, 2], those that it would have made.
    """

    reached: Array
    accepted: Array

    @property
    def chance(self) -> Array:
        """The probability that a drafted token is accepted, float32 [B, 2]."""
        return (self.accepted + PRIOR_TOKENS * PRIOR_SHARE) / (self.reached + PRIOR_TOKENS)

    def forgotten(self, drafter: int) -> "Trust":
        """The same but for one drafter, of which nothing is known."""
        return Trust(self.reached.at[:, drafter].set(0.0), self.accepted.at[:, drafter].set(0.0))


def no_experience(rows: int) -> Trust:
    """The trust in drafters that `rows` (B) rows begin with."""
    return Trust(jnp.zeros((rows, len(DRAFTERS))), jnp.zeros((rows, len(DRAFTERS))))


class Plan(NamedTuple):
    """How the next tokens are made.

    Attributes:
        verifies: bool [], whether drafts are verified; else the full model reads a single token.
        core_steps: int32 [], tokens that narrowed weights draft for every row.
        looks_up: bool [B], the rows whose draft is what was looked up.
    """

    verifies: Array
    core_steps: Array
    looks_up: Array


def plan_next(
    trust: Trust, found: Array, done: Array, costs: Array, spare: Array, forced: Array | np.integer, size: int
) -> Plan:
    """The plan that makes most tokens in the time, of those that may fail altogether and not take too long.

    A pass that verifies makes one token, and each drafted one that is accepted. With a probability p for each, g of
    them bring p + p^2 + .. + p^g (Leviathan et al. 2023, arXiv 2211.17192, equation 1).

    Args:
        trust: in the drafters.
        found: bool [B], rows for which something was looked up.
        done: bool [B], rows that make no more tokens.
        costs: float32 [2], of a pass that verifies, and of one step of narrowed weights; a pass over one token is 1.
        spare: float32 [], what a plan may cost beyond a pass over one token.
        forced: int32 [], `BEST`; or `SINGLE`, or 1 + g for a verification with g steps of narrowed weights.
        size: tokens that are drafted, at most.
    """
    of_core = _expected(trust.chance[:, CORE], size)
    of_lookup = jnp.where(found, _expected(trust.chance[:, LOOKUP], size)[:, -1], 0.0)[:, None]
    tokens = jnp.where(done[:, None], 0.0, 1 + jnp.maximum(of_core, of_lookup)).sum(axis=0)
    seconds = costs[0] + costs[1] * jnp.arange(size + 1, dtype=jnp.float32)
    alone = (~done).sum(dtype=jnp.float32)[None]
    speeds = jnp.where(seconds - 1 <= spare, tokens / seconds, 0.0)
    best = jnp.argmax(jnp.concatenate([alone, speeds])).astype(jnp.int32)
    chosen = jnp.where(forced == BEST, best, forced)
    steps = jnp.maximum(chosen - 1, 0)
    looks_up = found & (of_lookup[:, 0] >= jnp.take(of_core, steps, axis=1))
    return Plan(chosen > 0, steps, looks_up)


def could_pay(verify: float, step: float, size: int) -> bool:
    """Whether up to `size` tokens that narrowed weights draft could pay, while these are trusted as they are at first.

    Args:
        verify: cost of a pass that verifies; a pass over one token is 1.
        step: of one step of narrowed weights, at least.
        size: tokens that are drafted at most.
    """
    drafted = np.arange(1, size + 1)
    return bool((1 + np.cumsum(PRIOR_SHARE**drafted) > verify + step * drafted).any())


def _expected(chance: Array, size: int) -> Array:
    """How many of 0, 1, .. `size` drafted tokens are accepted on average, float32 [B, size + 1], by [B] chances."""
    of_each = jnp.cumprod(jnp.broadcast_to(chance[:, None], (chance.shape[0], size)), axis=1)
    return jnp.pad(jnp.cumsum(of_each, axis=1), ((0, 0), (1, 0)))


@jax.named_scope("look_up")
def look_up(history: Array, position: Array, size: int) -> tuple[Array, Array]:
    """What followed the last tokens of each text where they stood before.

    The longest n-gram counts, of those the latest. Where the text ends before `size` tokens, it is taken to go round.

    Args:
        history: int32 [B, S], the texts.
        position: int32 [B], where the last token of each stands.
        size: tokens to find.

    Returns:
        int32 [B, size], and bool [B], whether there is anything to go by.
    """
    S = history.shape[1]
    places = jnp.arange(S)[None, :]
    same, length = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
    for back in range(LONGEST):
        last = jnp.take_along_axis(history, jnp.maximum(position - back, 0)[:, None], axis=1)
        same &= (jnp.roll(history, back, axis=1) == last) & (places >= back)
        length += same.astype(jnp.int32)
    score = jnp.where((places < position[:, None]) & (length >= SHORTEST), length * S + places, -1)
    ends = jnp.argmax(score, axis=1)[:, None]
    later = ends + 1 + jnp.arange(size)[None, :] % (position[:, None] - ends)
    return jnp.take_along_axis(history, later, axis=1), score.max(axis=1) >= 0


@jax.named_scope("draft")
def draft_by_core(narrow: Params, rows: Rows, steps: Array, size: int) -> tuple[KVCache, Array]:
    """The tokens that narrowed weights make next: int32 [B, size], the first `steps`, int32 [], of them.

    They are drawn as the full model's are, with the same random numbers, so that equal logits give equal tokens.

    Returns:
        The cache too, with keys and values that are not the full model's in the slots from `position` on.
    """
    assert rows.history is not None, "rows that verify drafts hold their texts"

    def step(i: Array, drafted: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        cache, history = drafted
        position = rows.position + i
        token = jnp.take_along_axis(history, position[:, None], axis=1, mode="clip")
        hidden, cache, _ = extend(narrow, token, cache, position, observe_nothing)
        logits = penalised(unembed(narrow, hidden)[:, 0], rows.sampling, history, position + 1)
        return cache, put_tokens(history, position + 1, draw(logits, rows.sampling, rows.length + i)[:, None])

    cache, history = lax.fori_loop(0, steps, step, (rows.cache, rows.history))
    behind = rows.position[:, None] + 1 + jnp.arange(size)[None, :]
    return cache, jnp.take_along_axis(history, behind, axis=1, mode="clip")


def put_tokens(history: Array, start: Array, tokens: Array) -> Array:
    """`history` [B, S] with tokens [B, n] from slots `start` [B] on; those beyond its end are dropped."""
    rows, n = tokens.shape
    places = start[:, None] + jnp.arange(n)[None, :]
    return history.at[jnp.arange(rows)[:, None], places].set(tokens, mode="drop")
