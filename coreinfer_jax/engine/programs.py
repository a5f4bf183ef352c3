"""The compiled programs of a generation: the prefill, and the loop of decode steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from coreinfer_jax.engine.sampling import Sampling, draw
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.config import ModelConfig, RuleName
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.rules import RULES, Sums, column_norms_of
from coreinfer_jax.sparsity.votes import Voting, make_voting

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


@partial(jax.jit, static_argnames=("config", "rows", "layers", "rule", "early"))
def no_sums(config: ModelConfig, rows: int, layers: int, rule: RuleName, early: bool) -> list[Sums]:
    """The sums of `layers` layers before any token: zeros for `rows` (B) rows, also of `early` tokens if they count."""
    F, nobody = config.mlp_size, np.zeros((rows, 1), bool)
    voting = make_voting(nobody, F, 1.0, "per_token", nobody if early else None)
    activations, norms = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 1, F), (F,)))
    shapes = jax.eval_shape(RULES[rule].observe, activations, norms, voting)
    return [jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes) for _ in range(layers)]


# Cache and sums of earlier tokens are donated: the prompt's are added to them in place.
@partial(jax.jit, static_argnames=("voted", "rule"), donate_argnames=("cache", "sums"))
def prefill(
    params: Params,
    tokens: Array,
    lengths: Array,
    start: Array,
    cache: KVCache,
    sums: list[Sums],
    sampling: Sampling,
    voting: Voting | None,
    *,
    voted: tuple[int, ...],
    rule: RuleName,
) -> tuple[DecodeState, list[Sums], Array]:
    """Read prompts, add the sums of layers `voted`, draw the next token from the full model's logits [B, V].

    Args:
        params: dense weights.
        tokens: int32 [B, T], padded.
        lengths: int32 [B], tokens per row before padding.
        start: int32 [B], tokens per row that were read before.
        cache: what those left, with room for the prompts.
        sums: theirs, one entry per layer of `voted`.
        sampling: how to draw.
        voting: whose activations count, and how they vote; None when nobody's do.
        voted: layers.
        rule: what is summed up of their activations.
    """
    remaining = iter(params.layers)  # they are traced in order

    def observe(activations: Array) -> Sums:
        down = next(remaining).mlp.down
        return {} if voting is None else RULES[rule].observe(activations, column_norms_of(down.weight), voting)

    hidden, cache, observed = extend(params, tokens, cache, start, observe)
    logits = unembed(params, hidden[jnp.arange(tokens.shape[0]), lengths - 1][:, None])[:, 0]
    first = draw(logits, sampling, jnp.int32(0))
    state = DecodeState(
        cache=cache,
        token=first,
        position=start + lengths,
        length=jnp.ones_like(lengths),
        done=sampling.is_eos[first],
        step=jnp.int32(1),
        finite=jnp.isfinite(logits).all(),
    )
    return state, jax.tree.map(jnp.add, sums, [observed[l] for l in voted]), logits


# Loop-invariant code motion is off because on CPU it hoists float32 copies of bfloat16 weights out of the loop, a
# second, wider copy of the model made anew each dispatch. Sums in any order let CPU code use vector instructions for
# products with bfloat16 weights, without which they are many times slower since JAX 0.11; NaN, infinity and division
# stay exact.
DECODE_OPTIONS: dict[str, str | bool] = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_nans": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
}


# The cache is donated: each dispatch extends it in place.
@partial(jax.jit, donate_argnames="state", compiler_options=DECODE_OPTIONS)
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
