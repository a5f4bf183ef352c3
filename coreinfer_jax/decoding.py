"""The two compiled programs of a generation: the prefill, and the loop of decode steps."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from coreinfer_jax.cache import KVCache, init_cache
from coreinfer_jax.core.select import Votes, Voting, count_votes
from coreinfer_jax.models import extend, observe_nothing, unembed
from coreinfer_jax.params import Params
from coreinfer_jax.sampling import Sampling, draw

# Tokens a decode dispatch has room for. How many it makes is data, so streaming in small chunks and generating in
# large ones share a program.
DISPATCH = 64


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


@partial(jax.jit, static_argnames=("capacity", "voted"))
def prefill(
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
    observe = observe_nothing if voting is None else partial(count_votes, voting=voting)
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
def decode(params: Params, state: DecodeState, sampling: Sampling, steps: Array) -> tuple[DecodeState, Array]:
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
    hidden, cache, _ = extend(params, state.token[:, None], state.cache, state.position, observe_nothing)
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
