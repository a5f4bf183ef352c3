"""From logits to the next token: greedy, or drawn with temperature, top-k, top-p and min-p, as each row has it set."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from coreinfer_jax.engine.options import Drawing
from coreinfer_jax.model.config import ModelConfig


@struct.dataclass
class Sampling:
    """How each row's tokens are drawn and where it ends. Data of a compiled step: new settings compile nothing.

    Attributes:
        key: typed keys [B]; None where all rows decode greedily, which is a program of its own.
        temperature: float32 [B]; a row with 0 takes its most probable token.
        top_k: int32 [B]; V keeps every token.
        top_p: float32 [B]; 1 keeps every token.
        min_p: float32 [B]; 0 keeps every token.
        repetition_penalty: float32 [B]; 1 lowers no logit.
        no_repeat_ngram_size: int32 [B]; 0 lets every n-gram repeat.
        is_eos: bool [B, V], the tokens after which the row is complete.
        fill: int32 [B], the id that follows a completed row.
        budget: int32 [B], new tokens after which the row is complete.
    """

    key: Array | None
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    no_repeat_ngram_size: Array
    is_eos: Array
    fill: Array
    budget: Array


def make_sampling(config: ModelConfig, rows: int, drawing: Drawing, max_new_tokens: int) -> Sampling:
    """The same settings for `rows` (B) rows, the keys of all rows apart."""
    is_eos = np.zeros((rows, config.vocab_size), bool)
    is_eos[:, list(drawing.eos_ids)] = True

    def of_every_row(value: float, dtype: type[np.generic]) -> Array:
        return jnp.asarray(np.full(rows, value, dtype))

    return Sampling(
        key=None if drawing.key is None else _row_keys(drawing.key, np.arange(rows)),
        temperature=of_every_row(drawing.temperature, np.float32),
        top_k=of_every_row(min(drawing.top_k, config.vocab_size), np.int32),
        top_p=of_every_row(drawing.top_p, np.float32),
        min_p=of_every_row(drawing.min_p, np.float32),
        repetition_penalty=of_every_row(drawing.repetition_penalty, np.float32),
        no_repeat_ngram_size=of_every_row(drawing.no_repeat_ngram_size, np.int32),
        is_eos=jnp.asarray(is_eos),
        fill=of_every_row(fill_id(config), np.int32),
        budget=of_every_row(max_new_tokens, np.int32),
    )


def with_keys(sampling: Sampling) -> Sampling:
    """`sampling` as rows that also may draw: greedy ones get keys that nobody asks."""
    if sampling.key is not None:
        return sampling
    return replace(sampling, key=_row_keys(jax.random.key(0), np.arange(len(sampling.temperature))))


def fill_id(config: ModelConfig) -> int:
    """The id that fills a row of new tokens after its end: the model's padding id, 0 where it has none."""
    pad = config.pad_id
    return pad if pad is not None and 0 <= pad < config.vocab_size else 0


@jax.jit
def _row_keys(key: Array, rows: Array) -> Array:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


@jax.named_scope("draw")
def draw(logits: Array, sampling: Sampling, step: Array) -> Array:
    """The next token int32 [B] of logits float32 [B, V]; row i draws its t-th token with fold_in(its key, t).

    Greedy rows take the largest logit, ties to the lower id. Others divide logits by the temperature, drop tokens
    outside the top_k most probable, then outside the top_p nucleus and those less than min_p times as probable as the
    best, and draw one of the rest. Tokens that tie at a cut are kept together, so a cut never depends on their order.

    Args:
        logits: of the rows.
        sampling: theirs.
        step: int32 [B], t, how many tokens each has drawn.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.key is None:
        return best
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1, sampling.temperature)[:, None]
    cuts = (sampling.top_k < logits.shape[-1]) | (sampling.top_p < 1) | (sampling.min_p > 0)
    kept = lax.cond(cuts.any(), _keep_likely, lambda scaled, *_: scaled, scaled, sampling, cuts)
    keys = jax.vmap(jax.random.fold_in)(sampling.key, step)
    drawn = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
    return jnp.where(greedy, best, drawn)


def _keep_likely(scaled: Array, sampling: Sampling, cuts: Array) -> Array:
    """`scaled` [B, V] with -inf outside the top-k, top-p and min-p sets, in rows that `cuts` [B] names."""
    descending = -jnp.sort(-scaled, axis=-1)
    kth = jnp.take_along_axis(descending, sampling.top_k[:, None] - 1, axis=-1)
    in_top_k = jnp.where(descending >= kth, descending, -jnp.inf)
    probability = jax.nn.softmax(in_top_k, axis=-1)
    # A token belongs to the nucleus while those before it hold less than top_p. The first one always does, also where
    # top_p is so small that float32 holds 0 in its place.
    before = jnp.cumsum(probability, axis=-1) - probability
    in_nucleus = (before < sampling.top_p[:, None]).at[:, 0].set(True)
    nucleus_end = jnp.min(jnp.where(in_nucleus, in_top_k, jnp.inf), axis=-1, keepdims=True)
    least_likely = descending[:, :1] + jnp.log(sampling.min_p)[:, None]
    # Where nothing is cut, rounding in the sums must not cut either.
    ends = jnp.maximum(jnp.maximum(kth, nucleus_end), least_likely)
    least = jnp.where(cuts[:, None], ends, -jnp.inf)
    return jnp.where(scaled >= least, scaled, -jnp.inf)
