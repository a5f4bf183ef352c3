"""Lossless decoding from the host: measure what passes cost, then verify drafts, dispatch by dispatch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.engine.dispatch import Dispatch, bytes_read_per_token
from coreinfer_jax.engine.drafting import BEST, CORE, DRAFTERS, LOOK_EVERY, SINGLE, could_pay
from coreinfer_jax.engine.regathering import Regathering, nothing_watched
from coreinfer_jax.engine.results import Drafting
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.streamed_verification import decode_drafted_streamed
from coreinfer_jax.engine.verification import Drafted, decode_drafted, nothing_drafted, spare_time
from coreinfer_jax.model.backends import draft_size
from coreinfer_jax.model.host import is_on_host, mlp_bytes
from coreinfer_jax.model.shards import agreed
from coreinfer_jax.model.weights import Mlp, Params

# The cost of what there is not, or was not measured: it is not tried.
NEVER = 1e9
# What a pass takes at least, as a share of the call that was timed: that of an idle call may have been disturbed.
LEAST_SHARE = 0.1
# What is measured for the first time is taken to cost so many passes over one token: a step of narrowed weights, and
# two verifications beyond a pass each.
UNMEASURED = 1.0


@dataclass(frozen=True)
class Seconds:
    """What was measured of one pass over a token, one that verifies, and one step of narrowed weights.

    None is what was not measured: the generation ended before, or there was no time to lose for it.
    """

    single: float | None = None
    verify: float | None = None
    step: float | None = None

    @property
    def costs(self) -> Array:
        """What `plan_next` takes. A pass over more tokens takes no less: what seems so was disturbed."""
        return jnp.asarray([max(1.0, self._cost(self.verify)), self._cost(self.step)], jnp.float32)

    def _cost(self, seconds: float | None) -> float:
        return NEVER if self.single is None or seconds is None else seconds / self.single


@dataclass(frozen=True)
class _Run:
    """The two models, and a state with the tokens that were made since it was last shown.

    Attributes:
        params: the full model.
        narrow: the one that drafts, or None.
        moved: bytes that a pass of the full model moves to the device.
        decode: of a state, some tokens, costs and what is forced: `decode_drafted` of these models.
        size: tokens that are drafted at most (n).
        state: of the rows.
        tokens: of each row, since the state was last shown.
        regathering: how core neurons follow the rows' texts; None where they stay.
    """

    params: Params
    narrow: Params | None
    moved: int
    decode: Callable[[Drafted, np.int32, Array, np.int32], tuple[Drafted, Array, Array]]
    size: int
    state: Drafted
    tokens: tuple[tuple[int, ...], ...]
    regathering: Regathering | None = None

    @property
    def is_over(self) -> bool:
        return bool(np.array(self.state.rows.done).all())

    def on(self, tokens: int, costs: Array, forced: int) -> "_Run":
        """Up to `tokens` more; the state of this one is used up."""
        state, made, count = self.decode(self.state, np.int32(tokens), costs, np.int32(forced))
        new = zip(self.tokens, np.array(made), np.array(count), strict=True)
        return replace(self, state=state, tokens=tuple((*old, *row[:n]) for old, row, n in new))


def drafted(
    params: Params,
    narrow: Params | None,
    there: Mapping[int, Mlp],
    rows: Rows,
    tokens_per_dispatch: int,
    regathering: Regathering | None = None,
) -> Iterator[Dispatch]:
    """Dispatches of about so many tokens of the full model per row, until every row is done.

    The first one measures: it makes a few tokens, one after the other, in each way that could pay.

    Args:
        params: dense weights.
        narrow: the same narrowed to core neurons, or None to draft by prompt lookup alone.
        there: where MLPs stay on the host, those that are on the device all the same, by the layers' numbers.
        rows: that hold their history.
        tokens_per_dispatch: of the row that makes most; up to a draft's tokens more. Fewer between two looks at core
            neurons that follow the text.
        regathering: how these follow it; None where they stay.
    """
    streams, full = is_on_host(params), params.weights
    size = draft_size(params.token_embedding, rows.token.shape[0], streams)
    moved = sum(mlp_bytes(layer.mlp) for l, layer in enumerate(params.layers) if l not in there) if streams else 0
    decode = partial(decode_drafted_streamed, full, narrow, there) if streams else partial(decode_drafted, full, narrow)
    nothing = ((),) * rows.token.shape[0]
    watched = None if regathering is None else nothing_watched(regathering, size)
    state = nothing_drafted(rows, size, watched)
    run = _Run(full, narrow, moved, partial(decode, size=size), size, state, nothing, regathering)
    del narrow, decode  # the run alone holds the narrowed weights, until others are gathered in their place
    run, seconds = _measured(run)
    if seconds.step is None:
        # Core neurons do not draft: nothing is watched for them.
        run = replace(run, regathering=None, state=replace(run.state, watched=None))
    most = tokens_per_dispatch if run.regathering is None else min(tokens_per_dispatch, LOOK_EVERY)
    costs, made = agreed(seconds.costs, params.mesh), 0
    while True:
        made += sum(map(len, run.tokens))
        yield _dispatch(run, seconds, made)
        if run.is_over:
            return
        run = _followed(replace(run, tokens=nothing), seconds, costs).on(most, costs, BEST)


def _followed(run: _Run, seconds: Seconds, costs: Array) -> _Run:
    """The run with core neurons that follow its texts, where it is time to look at these."""
    known, rows = run.regathering, run.state.rows
    if known is None or not known.is_due(rows):
        return run
    assert run.state.watched is not None, "where core neurons follow"
    single = float(agreed(jnp.asarray(seconds.single, jnp.float32), run.params.mesh))

    def has_room(run: _Run, seconds: float | None) -> bool:
        return _has_room(run, costs, UNMEASURED if seconds is None else seconds / single)

    if not has_room(run, known.sum_seconds):
        return _charged(run, known.skipped(rows), single)
    known = known.summed_up(run.state.watched, rows)
    run = _charged(run, known, single)
    if not has_room(run, known.look_seconds):
        return run
    known, chosen = known.looked()
    run = _charged(run, known, single)
    if not known.has_drifted or not has_room(run, known.gather_seconds):
        return run
    known, narrow = known.gathered(chosen)
    # Other neurons draft otherwise than those before.
    state = replace(run.state, trust=run.state.trust.forgotten(CORE))
    decode = partial(decode_drafted, run.params, narrow, size=run.size)
    return _charged(replace(run, narrow=narrow, decode=decode, state=state), known, single)


def _charged(run: _Run, known: Regathering, single: float) -> _Run:
    """The run after what its regathering did, and that in its account."""
    assert run.state.watched is not None, "where core neurons follow"
    taken, start = jnp.float32(known.seconds / single), jnp.array(known.summed)
    state = replace(run.state, watched=replace(run.state.watched, start=start, taken=taken))
    return replace(run, state=state, regathering=known)


def _measured(run: _Run) -> tuple[_Run, Seconds]:
    """The run after a few tokens, and what passes take, less what a call without any takes.

    What is timed twice counts as the quicker turn: what else the machine does only adds.

    Passes over one token lose nothing. What else is measured is counted as lost, and not tried where that may be too
    much; steps of narrowed weights neither where the bytes that they read say that they cannot pay.
    """
    run, first = _timed(run, 1, SINGLE)  # compiles, in the first call of a shape
    if run.is_over:
        return run, Seconds()
    run, idle = _timed(run, 0, SINGLE)
    run, second = _timed(run, 1, SINGLE)
    seconds = Seconds(_less(idle, min(first, second)))
    if not _has_room(run, seconds.costs, UNMEASURED):
        return run, seconds
    run, verify = _timed(run, 1, 1)
    if not run.is_over:
        # With MLPs on the host, the first may have compiled what reads several tokens.
        run, again = _timed(run, 1, 1)
        verify = min(verify, again)
    seconds = replace(seconds, verify=_less(idle, verify))
    costs = agreed(seconds.costs, run.params.mesh)
    cost, least = float(costs[0]), _least_step(run)
    if not could_pay(cost, least, run.size) or not _has_room(run, costs, cost - 1 + UNMEASURED):
        return run, seconds
    run, drafted = _timed(run, 1, 2)
    assert seconds.single is not None, "measured first"
    return run, replace(seconds, step=max(drafted - verify, least * seconds.single))


def _has_room(run: _Run, costs: Array, cost: float) -> bool:
    """Whether there are tokens to make, and so much may be lost on the next."""
    return not run.is_over and cost <= float(spare_time(run.state, costs))


def _least_step(run: _Run) -> float:
    """What a step of narrowed weights costs at least, where a pass of the full model costs 1."""
    if run.narrow is None:
        return NEVER
    if run.moved:
        return 0.0  # how long a pass waits for what is moved is not known
    cache = run.state.rows.cache
    return bytes_read_per_token(run.narrow, cache) / bytes_read_per_token(run.params, cache)


def _less(idle: float, seconds: float) -> float:
    """The seconds of a call without those of an idle one."""
    return max(seconds - idle, LEAST_SHARE * seconds)


def _timed(run: _Run, tokens: int, forced: int) -> tuple[_Run, float]:
    """The run after up to so many tokens that are made in a given way, and the seconds that they took."""
    began = perf_counter()
    run = run.on(tokens, Seconds().costs, forced)
    jax.block_until_ready(run.state)
    return run, perf_counter() - began


def _dispatch(run: _Run, seconds: Seconds, made: int) -> Dispatch:
    """The run's tokens, with figures over all `made` so far."""
    state, longest = run.state, max(map(len, run.tokens))
    fill = np.array(state.rows.sampling.fill)[:, None]
    tokens = np.repeat(fill, longest, axis=1)
    for row, new in zip(tokens, run.tokens, strict=True):
        row[: len(new)] = new
    rows, passes = len(tokens), int(state.single) + int(state.verified)
    read = passes * bytes_read_per_token(run.params, state.rows.cache)
    if run.narrow is not None:
        read += int(state.core_steps) * bytes_read_per_token(run.narrow, state.rows.cache)
    lengths = np.array([len(new) for new in run.tokens], np.int32)
    return Dispatch(
        rows=state.rows,
        tokens=tokens,
        lengths=lengths,
        steps=passes,
        bytes_read_per_token=read * rows / max(made, 1),
        drafting=_drafting(run, seconds, made),
        moved_bytes=run.moved * passes,
        chosen=None if run.regathering is None else run.regathering.chosen,
    )


def _drafting(run: _Run, seconds: Seconds, made: int) -> Drafting:
    state = run.state
    by_place = zip(DRAFTERS, np.array(state.reached).tolist(), np.array(state.accepted).tolist(), strict=True)
    reached, accepted = {}, {}
    for name, said, kept in by_place:
        reached[name], accepted[name] = tuple(said), tuple(kept)
    known = run.regathering
    return Drafting(
        tokens=made,
        single_passes=int(state.single),
        verifications=int(state.verified),
        core_steps=int(state.core_steps),
        reached=reached,
        accepted=accepted,
        single_milliseconds=_milliseconds(seconds.single),
        verify_milliseconds=_milliseconds(seconds.verify),
        core_step_milliseconds=_milliseconds(seconds.step),
        regathered=0 if known is None else known.times,
        drift=None if known is None else known.drift,
        regathering_milliseconds=0.0 if known is None else 1000 * known.seconds,
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
