"""What a caller passes to `generate` and `stream`, checked once and turned into arrays of bucketed shapes.

JAX would not complain: gathers clamp ids that are out of range, and writes past the end of a cache shift or vanish.
So every bound is checked here, before anything is traced.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from coreinfer_jax.engine.sampling import Sampling
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.cache import bucket
from coreinfer_jax.model.config import ModelConfig

# Below it logits / temperature leaves the range of float32.
LEAST_TEMPERATURE = 1e-6
MOST_TEMPERATURE = float(np.finfo(np.float32).max)

Tokens = ArrayLike | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, each row stored from the left and padded to a common bucket.

    Attributes:
        tokens: int32 [B, T], T a bucket.
        lengths: int32 [B], tokens per row before padding.
    """

    tokens: np.ndarray
    lengths: np.ndarray


def pad_prompts(tokens: Tokens, config: ModelConfig) -> Prompts:
    """The rows of `tokens`, int [B, T] or a list of lists, checked and padded.

    Raises:
        CoreInferError: no rows, an empty row, ids that are not integers or lie outside the vocabulary.
    """
    rows = _rows(tokens)
    if not rows:
        raise CoreInferError("tokens: no rows; give int [B, T] or a list of lists")
    for i, row in enumerate(rows):
        _check_row(i, row, config)
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), bucket(int(lengths.max()))), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return Prompts(tokens=padded, lengths=lengths)


def _rows(tokens: Tokens) -> list[np.ndarray]:
    if not hasattr(tokens, "__array__") and not isinstance(tokens, Sequence):
        raise CoreInferError(f"tokens: {type(tokens).__name__}; give int [B, T] or a list of lists")
    if isinstance(tokens, str) or (isinstance(tokens, Sequence) and any(isinstance(row, str) for row in tokens)):
        raise CoreInferError("tokens: str; give ids, int [B, T] or a list of lists, from the model's tokenizer")
    if isinstance(tokens, Sequence):
        rows = [_row(i, row) for i, row in enumerate(tokens)]
    else:
        whole = np.asarray(tokens)
        if whole.ndim != 2:
            raise CoreInferError(f"tokens of shape {whole.shape}: give two axes [B, T], a single prompt as [1, T]")
        rows = list(whole)
    if any(row.ndim != 1 for row in rows):
        raise CoreInferError("tokens: a flat list of ids; a batch is a list of rows, a single prompt [[...]]")
    return rows


def _row(i: int, row: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(row)
    except ValueError as error:  # NumPy's word for lists of unequal depth
        raise CoreInferError(f"tokens: row {i} is not a flat list of ids") from error


def _check_row(i: int, row: np.ndarray, config: ModelConfig) -> None:
    if row.size == 0:
        raise CoreInferError(f"tokens: row {i} is empty; a prompt needs at least one token, for instance BOS")
    if not np.issubdtype(row.dtype, np.integer):
        raise CoreInferError(f"tokens: row {i} holds {row.dtype}; give integer token ids")
    outside = row[(row < 0) | (row >= config.vocab_size)]
    if outside.size:
        raise CoreInferError(
            f"tokens: row {i} holds id {outside[0]}, outside the vocabulary 0 .. {config.vocab_size - 1}; "
            "was the text encoded with another model's tokenizer?"
        )


def check_length(prompt: int, new: int, config: ModelConfig) -> None:
    """Refuse a prompt that leaves no room, within the model's positions, for the tokens asked for."""
    if not _is_whole(new) or new < 1:
        raise CoreInferError(f"max_new_tokens={shown(new)}: give a whole number of at least 1")
    room = config.max_positions - prompt
    if new > room:
        remedy = f"shorten the prompt or ask for at most {room}" if room > 0 else "shorten the prompt"
        total = f"{prompt} prompt tokens + max_new_tokens={shown(new)}"
        raise CoreInferError(f"{total} exceed the model's {config.max_positions} positions; {remedy}")


def check_finite(finite: Array, what: str = "logits") -> None:
    """Refuse to go on from logits, or other numbers named in `what`, that are not all `finite`, bool []."""
    if not bool(finite):
        raise CoreInferError(
            f"{what} are NaN or infinite: check the checkpoint, or use --dtype float32 (dtype='float32')"
        )


def make_sampling(
    config: ModelConfig,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_ids: Iterable[int],
    key: Array | int | None,
) -> Sampling:
    """Checked sampling settings as arrays.

    Raises:
        CoreInferError: a setting outside its range, a temperature without a key, an EOS id outside the vocabulary.
    """
    if not isinstance(temperature, Real) or not 0 <= temperature <= MOST_TEMPERATURE:
        raise CoreInferError(
            f"temperature={shown(temperature)}: give 0 for greedy decoding or a number above 0 and up to 3.4e38"
        )
    if 0 < temperature < LEAST_TEMPERATURE:
        raise CoreInferError(f"temperature={temperature}: give 0 for greedy decoding or at least {LEAST_TEMPERATURE}")
    if temperature > 0 and key is None:
        raise CoreInferError(f"temperature={temperature} draws at random: give key, a jax.random.key or an int seed")
    if top_k is not None and (not _is_whole(top_k) or top_k < 1):
        raise CoreInferError(f"top_k={shown(top_k)}: give a whole number of at least 1, or None to keep every token")
    if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise CoreInferError(f"top_p={shown(top_p)}: give a share above 0 and at most 1, or None to keep every token")
    is_eos = np.zeros(config.vocab_size, bool)
    if not isinstance(eos_ids, Iterable) or getattr(eos_ids, "ndim", 1) == 0:
        raise CoreInferError(f"eos_ids={shown(eos_ids)}: give a tuple of token ids")
    for eos in eos_ids:
        if not _is_whole(eos) or not 0 <= eos < config.vocab_size:
            raise CoreInferError(f"eos_ids: {shown(eos)} is outside the vocabulary 0 .. {config.vocab_size - 1}")
        is_eos[eos] = True
    return Sampling(
        key=None if temperature == 0 else _typed_key(key),
        temperature=jnp.asarray(np.float32(temperature)),
        top_k=jnp.asarray(np.int32(config.vocab_size if top_k is None else min(top_k, config.vocab_size))),
        top_p=jnp.asarray(np.float32(1.0 if top_p is None else top_p)),
        is_eos=jnp.asarray(is_eos),
        fill=jnp.asarray(np.int32(fill_id(config))),
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def fill_id(config: ModelConfig) -> int:
    """The id that fills a row of new tokens after its end: the model's padding id, 0 where it has none."""
    pad = config.pad_id
    return pad if pad is not None and 0 <= pad < config.vocab_size else 0


def _typed_key(key: Array | int | None) -> Array:
    """A typed key from an int seed, a typed key, or a raw uint32 key."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -(2**63) <= key < 2**63:
            raise CoreInferError(f"key={shown(key)}: give a seed of at most 63 bits")
        return jax.random.key(key)
    try:
        array = jnp.asarray(key if hasattr(key, "dtype") else "no array")
    except TypeError as error:
        raise CoreInferError(f"key={shown(key)}: give a jax.random.key or an int seed") from error
    if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        if array.dtype != jnp.uint32 or array.shape != jax.random.key_data(jax.random.key(0)).shape:
            raise CoreInferError(f"key of shape {array.shape}, {array.dtype}: give a jax.random.key or an int seed")
        array = jax.random.wrap_key_data(array)
    if array.shape != ():
        raise CoreInferError(f"key of shape {array.shape}: give a single key")
    return array
