"""Text into windows of tokens: documents, what is held out, the order in which windows are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.io.held import load_arrays
from coreinfer_jax.lab.training.recipe import Recipe
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.documents import SEPARATOR, read_utf8, split_at_separators

# Every 100th document of a file is held out, the last one where there are fewer.
HELD_OUT_EVERY = 100

# Held-out windows per file, spread over all its held-out documents: enough for two decimals of the loss.
HELD_OUT_WINDOWS = 32

# Share of the text a tokenizer sees: every n-th document.
VOCABULARY_EVERY = 3


@dataclass(frozen=True)
class Text:
    """One text file, cut into documents.

    Attributes:
        name: the file's name, without its folder.
        digest: SHA-256 of its bytes.
        documents: to train on.
        held_out: (number in the file, from 0; text) of the documents kept for measuring.
    """

    name: str
    digest: str
    documents: tuple[str, ...]
    held_out: tuple[tuple[int, str], ...]


def read_text(path: Path) -> Text:
    """The documents of a UTF-8 file, which lines holding only `<|endoftext|>` end.

    Raises:
        CoreInferError: no such file, not text in UTF-8, or fewer than two documents.
    """
    content, digest = read_utf8(path)
    documents = split_at_separators(content)
    if len(documents) < 2:
        raise CoreInferError(
            f"{path}: {len(documents)} document(s); at least two are needed, each ended by a line {SEPARATOR!r}: "
            "one of them is held out"
        )
    held = set(range(HELD_OUT_EVERY - 1, len(documents), HELD_OUT_EVERY)) or {len(documents) - 1}
    return Text(
        name=path.name,
        digest=digest,
        documents=tuple(document for i, document in enumerate(documents) if i not in held),
        held_out=tuple((i, documents[i]) for i in sorted(held)),
    )


def vocabulary_texts(texts: Sequence[Text]) -> list[str]:
    """What the tokenizer is trained on."""
    return [document for text in texts for document in text.documents[::VOCABULARY_EVERY]]


def tokenise(documents: Sequence[str], tokenizer: Tokenizer, bos_id: int, eos_id: int, vocab_size: int) -> np.ndarray:
    """Documents one after the other, each behind a BOS, closed by an EOS: uint16 [n]; shared ids are written once.

    Raises:
        CoreInferError: the tokenizer gives an id outside the vocabulary.
    """
    end = [] if bos_id == eos_id else [eos_id]
    tokens = np.array([i for document in documents for i in (*tokenizer.encode(document), *end)], np.int64)
    if tokens.size and tokens.max() >= vocab_size:
        raise CoreInferError(
            f"the tokenizer gives id {tokens.max()}, outside the vocabulary 0 .. {vocab_size - 1}; "
            "put the one that the model was trained with beside its weights"
        )
    return tokens.astype(np.uint16)


def load_tokens(path: Path, names: Sequence[str], recipe: Recipe) -> dict[str, np.ndarray]:
    """The token arrays `names` in a run's file of tokens: uint16 [n], each.

    Raises:
        CoreInferError: a file that is missing or damaged.
    """
    try:
        _, stored = load_arrays(path)
        tokens = {name: stored[name] for name in names}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = shown_name(str(error))
        raise CoreInferError(f"{path}: cannot be read ({reason}); remove the run's directory to start over") from error
    for name, array in tokens.items():
        whole = array.dtype == np.uint16 and array.ndim == 1 and len(array) >= recipe.sequence
        if not whole or array.max() >= recipe.vocab_size:
            raise CoreInferError(f"{path}: {name} are not this run's tokens; remove the run's directory to start over")
    return tokens


def windows(tokens: np.ndarray, numbers: np.ndarray, sequence: int, bos_id: int) -> np.ndarray:
    """Windows `numbers` of `tokens`: int32 [len(numbers), sequence + 1], a BOS first as in every prompt.

    Window i predicts tokens i * sequence .. (i + 1) * sequence - 1, so each token is predicted once per epoch.
    """
    slots = numbers[:, None] * sequence + np.arange(sequence)[None, :]
    bos = np.full((len(numbers), 1), bos_id, np.int32)
    return np.concatenate([bos, tokens[slots].astype(np.int32)], axis=1)


def batch(files: Sequence[np.ndarray], step: int, recipe: Recipe, bos_id: int) -> np.ndarray:
    """The windows of one step, int32 [B, T + 1], a function of its arguments only, so that training can be resumed.

    The rows take turns among the files: a small one is read as often as a large one, in several epochs if need be.
    Every epoch reads a file's windows in an order of its own.
    """
    rows = []
    for row in range(step * recipe.batch, (step + 1) * recipe.batch):
        file, turn = row % len(files), row // len(files)
        count = len(files[file]) // recipe.sequence
        epoch, position = divmod(turn, count)
        order = np.random.default_rng([recipe.seed, file, epoch]).permutation(count)
        rows.append(windows(files[file], order[position : position + 1], recipe.sequence, bos_id))
    return np.concatenate(rows)


def held_out_windows(tokens: np.ndarray, sequence: int, bos_id: int) -> np.ndarray:
    """Up to 32 windows spread evenly over held-out tokens: int32 [n, T + 1]."""
    count = len(tokens) // sequence
    numbers = np.unique(np.linspace(0, count - 1, min(count, HELD_OUT_WINDOWS)).astype(np.int64))
    return windows(tokens, numbers, sequence, bos_id)
