"""Prompts, checked once and turned into arrays of bucketed shapes.

JAX would not complain: gathers clamp ids that are out of range, and writes past the end of a cache shift or vanish.
So every bound is checked here, before anything is traced.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from coreinfer_jax.engine.options import is_whole
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.cache import bucket
from coreinfer_jax.model.config import ModelConfig

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


def without_first(prompts: Prompts, read: int) -> Prompts:
    """What is left of `prompts` behind their first `read` tokens, at least one token of each."""
    lengths = prompts.lengths - read
    rest = prompts.tokens[:, read:]
    width = bucket(int(lengths.max()))
    padded = np.pad(rest, ((0, 0), (0, max(0, width - rest.shape[1]))))
    return Prompts(tokens=padded[:, :width], lengths=lengths)


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
    if not is_whole(new) or new < 1:
        raise CoreInferError(f"max_new_tokens={shown(new)}: give a whole number of at least 1")
    left = config.max_positions - prompt
    if new > left:
        remedy = f"shorten the prompt or ask for at most {left}" if left > 0 else "shorten the prompt"
        total = f"{prompt} prompt tokens + max_new_tokens={shown(new)}"
        raise CoreInferError(f"{total} exceed the model's {config.max_positions} positions; {remedy}")
