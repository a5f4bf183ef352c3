"""From logits to the next token: greedy, or drawn with temperature, top-k and top-p."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax


@struct.dataclass
class Sampling:
    """How tokens are drawn and where rows end. Data of a compiled step: new settings compile nothing.

    Attributes:
        key: a `jax.random.key`, or None for greedy decoding, which is a program of its own.
        temperature: float32 [], > 0 where there is a key.
        top_k: int32 []; V keeps every token.
        top_p: float32 []; 1 keeps every token.
        is_eos: bool [V], the tokens after which a row is complete.
        fill: int32 [], the id that follows a completed row.
    """

    key: Array | None
    temperature: Array
    top_k: Array
    top_p: Array
    is_eos: Array
    fill: Array


@jax.named_scope("draw")
def draw(logits: Array, sampling: Sampling, step: Array) -> Array:
    """The next token int32 [B] of logits float32 [B, V]; row i at step t draws with fold_in(fold_in(key, i), t).

    Greedy decoding takes the largest logit, ties to the lower id. Otherwise logits are divided by the temperature,
    tokens outside the top_k most probable and then outside the top_p nucleus are dropped, and one of the rest is drawn.
    Tokens that tie at a cut are kept together, so a cut never depends on their order.
    """
    key = sampling.key
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / sampling.temperature
    cuts = (sampling.top_k < logits.shape[-1]) | (sampling.top_p < 1)
    kept = lax.cond(cuts, _keep_likely, lambda scaled, _: scaled, scaled, sampling)
    rows = jnp.arange(logits.shape[0])
    row_keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), step))(rows)
    return jax.vmap(jax.random.categorical)(row_keys, kept).astype(jnp.int32)


def _keep_likely(scaled: Array, sampling: Sampling) -> Array:
    """`scaled` [B, V] with -inf outside the top-k and then the top-p set."""
    descending = -jnp.sort(-scaled, axis=-1)
    kth = jnp.take_along_axis(descending, jnp.broadcast_to(sampling.top_k - 1, (scaled.shape[0], 1)), axis=-1)
    in_top_k = jnp.where(descending >= kth, descending, -jnp.inf)
    probability = jax.nn.softmax(in_top_k, axis=-1)
    # A token belongs to the nucleus while those before it hold less than top_p; the first one always does.
    before = jnp.cumsum(probability, axis=-1) - probability
    nucleus_end = jnp.min(jnp.where(before < sampling.top_p, in_top_k, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= jnp.maximum(kth, nucleus_end), scaled, -jnp.inf)
