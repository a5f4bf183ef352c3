"""What makes a text repeat itself less: logits of tokens that were read or made before are lowered, or ruled out."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from coreinfer_jax.engine.sampling import Sampling


@jax.named_scope("penalise")
def penalised(logits: Array, sampling: Sampling, history: Array | None, length: Array) -> Array:
    """Logits float32 [B, V] of the next token, less what its row's settings take from tokens that repeat.

    The repetition penalty divides a positive logit of a token that stands in the text, and multiplies a negative one.
    A token that would complete an n-gram which stands in the text gets -inf.

    Args:
        logits: of the rows.
        sampling: theirs.
        history: int32 [B, S], the tokens of each row's text, its prompt first; None where no row has such settings,
            which is a program of its own.
        length: int32 [B], how many of them there are.
    """
    if history is None:
        return logits
    asked = (sampling.repetition_penalty != 1) | (sampling.no_repeat_ngram_size > 0)
    return lax.cond(asked.any(), _penalise, lambda logits, *_: logits, logits, sampling, history, length)


def _penalise(logits: Array, sampling: Sampling, history: Array, length: Array) -> Array:
    V = logits.shape[-1]
    stands = jnp.arange(history.shape[1])[None, :] < length[:, None]
    penalty = sampling.repetition_penalty[:, None]
    lowered = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(_tokens_at(stands, history, V), lowered, logits)
    repeats = _tokens_at(stands & _ends_again(history, length, sampling.no_repeat_ngram_size), history, V)
    # Where every token would repeat something, one of them must still be taken.
    return jnp.where(repeats & ~repeats.all(axis=-1, keepdims=True), -jnp.inf, logits)


def _tokens_at(places: Array, history: Array, vocab_size: int) -> Array:
    """The tokens of `history` [B, S] at `places`, bool [B, S], as bool [B, V]."""
    rows = jnp.arange(history.shape[0])[:, None]
    marked = jnp.zeros((history.shape[0], vocab_size), bool)
    return marked.at[rows, jnp.where(places, history, vocab_size)].set(True, mode="drop")


def _ends_again(history: Array, length: Array, size: Array) -> Array:
    """Where a text's token would end the same n-gram as its next token, bool [B, S].

    That is where the n - 1 tokens before it are the last n - 1 of the text.

    Args:
        history: int32 [B, S], the texts.
        length: int32 [B], theirs.
        size: int32 [B], n; 0 for nowhere.
    """
    places = jnp.arange(history.shape[1])[None, :]

    def compare(back: Array, same: Array) -> Array:
        last = jnp.take_along_axis(history, jnp.maximum(length - back, 0)[:, None], axis=1)
        before = jnp.roll(history, back, axis=1)
        return same & ((before == last) | (back >= size[:, None]))

    begun = (size[:, None] > 0) & (places >= size[:, None] - 1)
    return lax.fori_loop(1, jnp.max(size), compare, jnp.broadcast_to(begun, history.shape))
